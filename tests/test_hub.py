"""Publishing, with the real client against a small Hub on loopback: what is uploaded, what fails and how it says so."""

import json
import runpy
import shutil
import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from peft import LoraConfig

import qlora_dpo.hub
from qlora_dpo import QLoRADPOTrainer, load_policy, merge_adapter, push_adapter
from qlora_dpo.__main__ import main
from qlora_dpo.errors import PushError
from qlora_dpo.hub import adapter_files, without_secrets

from hub_server import READER, STRANGER, WRITER, Hub
from tiny_chat import CHAT_ROWS

TOP = {
    "adapter_model.safetensors", "adapter_config.json", "qlora_dpo.json", "README.md", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", ".gitattributes",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to, with a writer logged in by the environment."""
    with Hub() as served:
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield served
        close_session()


@pytest.fixture(scope="module")
def run(base_folder, tokenizer, tmp_path_factory):
    """A run's folder with everything that must stay at home."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-dpo"
    rows = Dataset.from_list(CHAT_ROWS)
    trainer = trainer_of(
        base_folder, tokenizer, folder, rows, save_strategy="steps", save_steps=3, max_steps=3, sample_generations=1
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    for name in ("training_args.bin", "optimizer.pt", "pairs.jsonl", "generations.jsonl", "adapter_model.bin"):
        (folder / name).write_text("private")
    (folder / "reference").mkdir()
    (folder / "reference" / "average.safetensors").write_text("private")
    return folder


@pytest.fixture
def adapter(run, tmp_path):
    return shutil.copytree(run, tmp_path / "tiny-dpo")


def trainer_of(base_folder, tokenizer, folder, rows, policy=None, **options):
    from qlora_dpo import QLoRADPOConfig

    defaults = {
        "max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "bf16": False, "sample_max_new_tokens": 4, "per_device_train_batch_size": 2,
    }  # fmt: skip
    if not options.get("sample_generations"):
        del defaults["sample_max_new_tokens"]
    args = QLoRADPOConfig(output_dir=str(folder), **(defaults | options))
    return QLoRADPOTrainer(policy or load_policy(base_folder), None, args, None, rows, rows.select([0]), tokenizer)


def pushed(hub, repo_id="ada/tiny-dpo", revision="main"):
    return hub.repos[repo_id].files(revision)


def state_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- what is uploaded ------------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_with_what_belongs_to_it_and_nothing_else(hub, adapter):
    info = push_adapter(str(adapter), "ada/tiny-dpo", commit_message="First")
    files = pushed(hub)
    assert {name for name in files if not name.startswith("charts/")} == TOP
    assert "charts/loss.png" in files
    assert {name for name in files if name.startswith("charts/")} == {
        f"charts/{p.name}" for p in adapter.glob("charts/*")
    }
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert info.oid == hub.repos["ada/tiny-dpo"].branches["main"]
    assert hub.repos["ada/tiny-dpo"].messages[-1] == "First"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "load_policy" in card.text
    assert "'ada/tiny-dpo'" in card.text
    assert b"private" not in b"".join(files.values())


@pytest.mark.parametrize("name", ["ada/other", "other"])
def test_the_card_for_the_hub_names_the_repository_and_the_folder_stays_as_it_is(hub, adapter, name):
    shutil.rmtree(adapter / "charts")  # drawn for the push alone
    before = state_of(adapter)
    push_adapter(str(adapter), name)
    assert state_of(adapter) == before
    files = pushed(hub, "ada/other")
    assert "# other\n" in files["README.md"].decode()
    assert "adapter='ada/other'" in files["README.md"].decode()
    assert "(charts/loss.png)" in files["README.md"].decode()
    assert files["charts/loss.png"].startswith(b"\x89PNG")


def test_pushing_the_same_again_commits_nothing(hub, adapter):
    first = push_adapter(str(adapter), "ada/tiny-dpo")
    assert push_adapter(str(adapter), "ada/tiny-dpo").oid == first.oid
    assert len(hub.repos["ada/tiny-dpo"].messages) == 2  # the Hub's own and one


def test_the_command_pushes_to_a_private_repository(hub, adapter, capsys):
    assert main(["push", "--adapter", str(adapter), "--repo_id", "tiny-dpo", "--private"]) == 0
    assert hub.repos["ada/tiny-dpo"].private
    assert "adapter pushed" in capsys.readouterr().out


def test_a_public_repository_is_not_taken_for_a_private_one(hub, adapter):
    hub.add("ada/tiny-dpo", {})
    with pytest.raises(PushError, match="it is there already and public"):
        push_adapter(str(adapter), "ada/tiny-dpo", private=True)
    assert pushed(hub) == {}


def test_a_branch_or_a_pull_request(hub, adapter):
    hub.add("ada/tiny-dpo", {}, branch="v2")
    push_adapter(str(adapter), "ada/tiny-dpo", revision="v2")
    assert set(pushed(hub, revision="v2")) > {"adapter_model.safetensors"}
    hub.add("ada/tiny-dpo", {})
    assert push_adapter(str(adapter), "ada/tiny-dpo", create_pr=True).pr_num == 1
    assert pushed(hub) == {}


def test_an_adapter_of_another_name_lies_at_the_top(hub, base_folder, tokenizer, tmp_path):
    from peft import get_peft_model

    from qlora_dpo.model import load_base

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(load_base(base_folder), lora, adapter_name="mine")
    trainer_of(base_folder, tokenizer, tmp_path / "x", Dataset.from_list(CHAT_ROWS), policy).save_model()
    push_adapter(str(tmp_path / "x"), "ada/x")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "qlora_dpo.json"} <= set(
        pushed(hub, "ada/x")
    )


def test_a_card_that_a_person_took_over_is_pushed_as_it_is(hub, adapter):
    own = "---\nlibrary_name: peft\n---\n# My words\n"
    (adapter / "README.md").write_text(own)
    push_adapter(str(adapter), "ada/tiny-dpo")
    assert pushed(hub)["README.md"].decode() == own == (adapter / "README.md").read_text()


def test_a_base_that_others_do_not_have_is_said(hub, adapter, base_folder):
    with pytest.warns(UserWarning, match="which others do not have"):
        push_adapter(str(adapter), "ada/tiny-dpo")


def test_only_safetensors_are_weights(hub, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"in adapter_model\.safetensors, got none .*save_pretrained"):
        push_adapter(str(adapter), "ada/tiny-dpo")
    with pytest.raises(ValueError, match=r"in adapter_model\.safetensors"):
        load_policy(str(adapter))
    assert hub.repos == {}


def test_what_is_no_saved_adapter_is_refused(hub, adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` must be a folder"):
        push_adapter("ada/tiny-dpo", "ada/tiny-dpo")
    record = (adapter / "qlora_dpo.json").read_text()
    (adapter / "qlora_dpo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"beside its qlora_dpo\.json"):
        push_adapter(str(adapter), "ada/tiny-dpo")
    shutil.copytree(adapter, tmp_path / "two" / "a")
    shutil.copytree(adapter, tmp_path / "two" / "b")
    (tmp_path / "two" / "qlora_dpo.json").write_text(record)
    with pytest.raises(FileNotFoundError, match=r"must hold one adapter, got \['a', 'b'\] in .*two. Name its folder"):
        adapter_files(str(tmp_path / "two"))


# ---- what fails ------------------------------------------------------------------------------------------------------


def refused(hub, adapter, repo_id="ada/tiny-dpo", **options):
    """The message of a push that must fail, after which every file must be as it was."""
    before = state_of(adapter)
    with pytest.raises(PushError) as caught:
        push_adapter(str(adapter), repo_id, **options)
    assert state_of(adapter) == before
    text = str(caught.value)
    assert text.startswith(f"The push to {repo_id} failed: ")
    assert f"qlora-dpo push --adapter {adapter} --repo_id {repo_id}" in text
    for token in (WRITER, READER, STRANGER, options.get("token")):
        assert not token or token.strip() not in text
    assert caught.value.__cause__ is None
    return text


@pytest.mark.parametrize(
    ("token", "message"), [(READER, "Use a token that may write"), (STRANGER, "Use a token that may write")]
)
def test_a_token_that_may_not_write_is_told_so(hub, adapter, token, message):
    assert message in refused(hub, adapter, token=token)


def test_a_token_that_nobody_knows_is_told_so(hub, adapter):
    assert "hf auth login" in refused(hub, adapter, token="hf_nobody0123456789")


def test_without_a_login_the_way_out_is_said(hub, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(hub, adapter)


def test_a_private_repository_of_somebody_else_is_not_written(hub, adapter):
    hub.add("bob/x", {}, private=True)
    assert "Use a token that may write" in refused(hub, adapter, "bob/x")
    assert pushed(hub, "bob/x") == {}


def test_a_token_that_cannot_be_sent_is_not_shown(hub, adapter):
    """The HTTP client shows a header that it refuses: `Illegal header value b'Bearer hf_...'`."""
    assert "hf_with" not in refused(hub, adapter, token="hf_with\x07bell0123456789")
    push_adapter(str(adapter), "ada/tiny-dpo", token=f"{WRITER}\n")  # as a file has it
    assert "adapter_model.safetensors" in pushed(hub)


def test_a_branch_that_is_not_there_is_told_so(hub, adapter):
    text = refused(hub, adapter, revision="v9")
    assert "the branch `revision`" in text
    assert text.endswith("--revision v9")


def test_a_commit_in_between_is_told_so(hub, adapter):
    hub.fail("POST", "/commit/", 412)
    assert "Somebody else committed at the same time: push again." in refused(hub, adapter)
    push_adapter(str(adapter), "ada/tiny-dpo")


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_a_dropped_connection_is_told_so_and_can_be_repeated(hub, adapter, where):
    hub.fail("POST", where, None)
    assert "Check the network." in refused(hub, adapter)
    push_adapter(str(adapter), "ada/tiny-dpo")
    assert set(pushed(hub)) > {"adapter_model.safetensors"}


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/"])
def test_too_many_requests_are_waited_for(hub, adapter, where, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.fail("POST", where, 429, 2, **{"Retry-After": "7"})
    push_adapter(str(adapter), "ada/tiny-dpo")
    assert [round(wait) for wait in waits if wait >= 7] in ([7, 7], [8, 8])  # the client adds a second to its own
    assert set(pushed(hub)) > {"adapter_model.safetensors"}


def test_waiting_has_an_end(hub, adapter, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.fail("POST", "/commit/", 429, 99)
    assert "wait some minutes" in refused(hub, adapter)
    assert waits == [2.0, 4.0, 8.0, 16.0]
    hub.fail("POST", "/api/repos/create", 429, 1, **{"Retry-After": "3600"})
    assert "wait some minutes" in refused(hub, adapter)


def test_a_hub_that_is_switched_off_by_the_environment_is_told_so(hub, adapter, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "Unset HF_HUB_OFFLINE." in refused(hub, adapter)


def test_the_command_says_it_in_one_line(hub, adapter, capsys):
    hub.fail("POST", "/commit/", 412)
    assert main(["push", "--adapter", str(adapter), "--repo_id", "ada/tiny-dpo"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qlora-dpo push: The push to ada/tiny-dpo failed: HfHubHTTPError")
    again = f"qlora-dpo push --adapter {adapter} --repo_id ada/tiny-dpo"
    assert last.endswith(f"Nothing in {adapter} was changed by it; push again with: {again}")


def test_xet_that_cannot_be_reached_is_told_so(hub, adapter, monkeypatch):
    """The server knows no Xet token: the client's own uploader gives up."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1" in refused(hub, adapter)


def test_secrets_are_taken_out_of_a_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my own token")
    text = without_secrets("my own token, other, hf_abcdefgh0123, hf_x", "other")
    assert text == "***, ***, hf_***, hf_x"


# ---- the trainer -----------------------------------------------------------------------------------------------------


def test_the_trainer_pushes_what_push_adapter_pushes(hub, base_folder, tokenizer, tmp_path):
    trainer = trainer_of(
        base_folder, tokenizer, tmp_path / "run", Dataset.from_list(CHAT_ROWS), push_to_hub=True, hub_strategy="end",
        hub_model_id="mine", hub_private_repo=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert set(pushed(hub, "ada/mine")) == {".gitattributes"}
    info = trainer.push_to_hub(tags=["extra"], language="en")
    assert hub.repos["ada/mine"].private
    files = pushed(hub, "ada/mine")
    assert {name for name in files if not name.startswith("charts/")} == TOP
    card = ModelCard(files["README.md"].decode())
    assert "Model Card for Model ID" not in card.text
    assert "generated automatically" not in card.text
    assert "extra" in card.data.tags
    assert card.data.language == "en"
    assert info.oid == hub.repos["ada/mine"].branches["main"]
    before = len(hub.repos["ada/mine"].messages)
    trainer.save_model()  # which pushes, where push_to_hub is on
    assert hub.repos["ada/mine"].messages[-1] in ("Model save", "End of training")
    assert len(hub.repos["ada/mine"].messages) >= before
    with pytest.raises(TypeError, match=r"`finetuned_from` must be None, got 'x': .* Leave it out"):
        trainer.create_model_card(finetuned_from="x")
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == hub.repos["ada/mine"].branches["main"]


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", set()),
        ("every_save", {""}),
        ("checkpoint", {"", "last-checkpoint/"}),
        ("all_checkpoints", {"", "checkpoint-1/", "checkpoint-2/"}),
    ],
)
def test_checkpoints_are_pushed_as_the_strategy_says(hub, base_folder, tokenizer, tmp_path, strategy, places):
    trainer = trainer_of(
        base_folder, tokenizer, tmp_path / "run", Dataset.from_list(CHAT_ROWS), push_to_hub=True,
        hub_strategy=strategy, hub_always_push=True, save_strategy="steps", save_steps=1, max_steps=2,
        save_total_limit=1, hub_token=WRITER,
    )  # fmt: skip
    trainer.train()
    files = pushed(hub, "ada/run")
    assert set(files) == {".gitattributes"} | {place + name for place in places for name in TOP - {".gitattributes"}}
    if places:
        last = (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
        assert files["adapter_model.safetensors"] == last
        assert "Model Card for Model ID" not in files["README.md"].decode()
    assert not list(tmp_path.rglob(".push-*"))


def test_a_checkpoint_that_cannot_be_pushed_is_a_warning_and_training_goes_on(hub, base_folder, tokenizer, tmp_path):
    trainer = trainer_of(
        base_folder, tokenizer, tmp_path / "run", Dataset.from_list(CHAT_ROWS), push_to_hub=True,
        hub_strategy="every_save", save_strategy="steps", save_steps=1, max_steps=2, hub_always_push=True,
    )  # fmt: skip
    hub.fail("POST", "/commit/", 403)
    with pytest.warns(UserWarning, match=r"qlora-dpo push --adapter .*checkpoint-1 --repo_id ada/run"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert pushed(hub, "ada/run")["adapter_model.safetensors"]


def test_a_hub_that_refuses_is_found_before_the_training(hub, base_folder, tokenizer, tmp_path):
    with pytest.raises(PushError, match="Use a token that may write"):
        trainer_of(
            base_folder, tokenizer, tmp_path / "run", Dataset.from_list(CHAT_ROWS), push_to_hub=True, hub_token=READER
        )


def test_the_command_line_trains_evaluates_and_pushes_last(hub, base_folder, rows_file, tmp_path, capsys):
    """A push that fails comes behind everything that is saved."""
    words = [
        "train", "--model_name_or_path", base_folder, "--dataset_name", rows_file, "--output_dir", str(tmp_path / "r"),
        "--dataset_test_split", "train[:3]", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1",
        "--push_to_hub", "true", "--hub_strategy", "end", "--save_strategy", "no",
    ]  # fmt: skip
    hub.fail("POST", "/commit/", 412)
    assert main(words) == 2
    assert "push again with: qlora-dpo push" in capsys.readouterr().err
    for name in ("metrics.json", "trainer_state.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "r" / name).is_file()
    assert main(["push", "--adapter", str(tmp_path / "r"), "--repo_id", "ada/r"]) == 0
    assert "| rows.jsonl train\\[:3\\]" in pushed(hub, "ada/r")["README.md"].decode().replace("[:3]", "\\[:3\\]")


def test_nothing_is_warned_about_an_adapter_on_an_id(hub, adapter):
    record = json.loads((adapter / "qlora_dpo.json").read_text()) | {"base": "org/base"}
    (adapter / "qlora_dpo.json").write_text(json.dumps(record))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        push_adapter(str(adapter), "ada/tiny-dpo")
    assert qlora_dpo.hub.TRIES > 1


@pytest.mark.parametrize("revision", ["", "@main"])
def test_an_adapter_of_the_hub_is_merged_with_its_own_template(hub, adapter, tmp_path, revision):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    push_adapter(str(adapter), "ada/tiny-dpo")
    report = merge_adapter(f"ada/tiny-dpo{revision}", str(tmp_path / "merged"))
    assert report.adapters == [f"ada/tiny-dpo{revision}"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize("public", [False, True])
def test_the_example_pushes_and_loads_what_it_pushed(hub, adapter, base_folder, monkeypatch, capsys, public):
    example = Path(__file__).parent.parent / "examples" / "push_to_hub.py"
    words = ["--adapter", str(adapter), "--repo_id", "ada/tiny-dpo", *["--public"] * public]
    monkeypatch.setattr("sys.argv", [str(example), *words])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert hub.repos["ada/tiny-dpo"].private is not public
    assert hub.repos["ada/tiny-dpo"].branches["main"] in said
    assert f"loaded from there: adapter 'default' on {base_folder}" in said
