"""The command line: options from flags and YAML, runs from end to end, and errors a person can act on."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import qlora_dpo
from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, cli, evaluate_preferences, load_policy
from qlora_dpo.__main__ import COMMANDS, main
from qlora_dpo.cli import RUNS, DataArguments, ModelArguments, parse
from qlora_dpo.config import EVALUATION_FIELDS
from qlora_dpo.model import load_base
from qlora_dpo.record import weights_hash
from qlora_dpo.resuming import frozen_weights

from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama, ranked_row

QUIET = ["--report_to", "none", "--disable_tqdm", "true"]
QUICK = [*QUIET, "--save_strategy", "no", "--max_steps", "2"]


def train_words(base_folder, rows_file, output_dir):
    return [
        "train", "--model_name_or_path", base_folder, "--dataset_name", rows_file, "--output_dir", str(output_dir),
        "--dataset_train_split", "train[:8]", "--dataset_test_split", "train[8:]", "--learning_rate", "1e-3", *QUICK,
    ]  # fmt: skip


def test_train_then_evaluate_from_the_adapter_alone(base_folder, rows_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["before"]["eval_rewards/ties"] == 1
    assert trained["after"]["eval_rewards/ties"] == 0
    assert "preference accuracy" in capsys.readouterr().out
    words = ["evaluate", "--adapter", str(run), "--dataset_name", rows_file, "--dataset_test_split", "train[8:]"]
    assert main([*words, "--output_dir", str(tmp_path / "eval"), *QUIET]) == 0
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for key in ("eval_rewards/margins", "eval_rewards/accuracies", "eval_loss", "eval_logps/chosen"):
        assert found[key] == pytest.approx(trained["after"][key], rel=1e-6), key
    assert found["eval_preference_accuracy"] == found["eval_rewards/accuracies"]


@pytest.fixture(scope="module")
def run_apart(base_folder, tmp_path_factory):
    """A training in a process of its own, whose terminal shows `cp1252`, and its folder."""
    folder = tmp_path_factory.mktemp("apart")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"subset": "\u6570\u5b66"}) + "\n" for row in CHAT_ROWS))
    words = [sys.executable, "-m", "qlora_dpo", *train_words(base_folder, str(rows), folder / "run")]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    return done, folder / "run"


def test_a_training_is_saved_whatever_the_terminal_can_show(run_apart):
    """As where output goes to a file on Windows: `cp1252` has no Chinese."""
    done, run = run_apart
    assert (done.returncode, b"\\u6570\\u5b66" in done.stdout) == (0, True)
    assert (run / "adapter_model.safetensors").is_file()


def test_a_command_says_nothing_of_the_packages_below_it(run_apart):
    """The first line of every command was bitsandbytes' about a kernel, on a CPU with bf16 instructions."""
    shown = run_apart[0].stderr
    assert b"metrics written to" in shown
    assert b"gemm_4bit_forward" not in shown
    assert b"is_gradient_checkpointing" not in shown
    assert b"FutureWarning" not in shown


def test_a_run_that_diverged_keeps_its_log(base_folder, rows_file, tmp_path, capsys):
    assert main([*train_words(base_folder, rows_file, tmp_path / "run"), "--learning_rate", "1e30"]) == 2
    assert "Rewards must be finite to be judged" in capsys.readouterr().err
    assert (tmp_path / "run" / "trainer_state.json").is_file()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_every_data_set_and_split_has_a_folder_of_its_own(base_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    sets = {"helpful": CHAT_ROWS[:8], "harmless": CHAT_ROWS[8:]}
    for name, rows in sets.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [("helpful", "train"), ("harmless", "train"), ("helpful", "train[:50%]"), ("helpful", "train[:50]")]
    for name, split in [*asked, asked[0]]:
        words = ["evaluate", "--adapter", str(run), "--dataset_name", str(tmp_path / name / "test.jsonl"), *QUIET]
        assert main([*words, "--dataset_test_split", split]) == 0
    reports = {path.parent.name: json.loads(path.read_text()) for path in (run / "evaluations").glob("*/report.json")}
    found = {name: report["pairs"] for name, report in reports.items()}
    assert found == {"test": 8, "test-2": 4, "test-train-_50": 4, "test-train-_50-2": 8}


@pytest.fixture
def hub_base(tmp_path, tokenizer, monkeypatch):
    """`org/tiny` in the cache: `main` and `v2`, of other weights, and `v2` with another template."""
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit, seed in (("main", "a" * 40, 0), ("v2", "b" * 40, 7)):
        (repo / "refs" / name).write_text(commit)
        build_tiny_llama(tokenizer, seed=seed).save_pretrained(repo / "snapshots" / commit)
        own = build_chat_tokenizer()
        own.chat_template = ("" if name == "main" else "V2 ") + own.chat_template
        own.save_pretrained(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/tiny"


def test_a_revision_among_the_options_of_the_model_is_the_tokenizers_too(hub_base, rows_file, tmp_path):
    words = train_words(hub_base, rows_file, tmp_path / "run")
    assert main([*words, "--model_init_kwargs", '{"revision": "v2"}']) == 0
    record = json.loads((tmp_path / "run" / "qlora_dpo.json").read_text())
    assert (record["base_revision"], record["base_commit"]) == ("v2", "b" * 40)
    assert (tmp_path / "run" / "chat_template.jinja").read_text().startswith("V2 ")


def trained_in_memory(folder, base, tokenizer):
    """The folder of an adapter trained on a model that was loaded elsewhere."""
    options = {"max_steps": 2, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    args, rows = QLoRADPOConfig(output_dir=str(folder), **options), Dataset.from_list(CHAT_ROWS)
    trainer = QLoRADPOTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return str(folder)


def test_the_commit_of_a_base_that_was_loaded_elsewhere_is_not_guessed(hub_base, rows_file, tokenizer, tmp_path):
    """It was that of the main branch; and that other weights are judged now was not said."""
    base = AutoModelForCausalLM.from_pretrained(hub_base, revision="v2", dtype=torch.bfloat16)
    run = trained_in_memory(tmp_path / "run", base, tokenizer)
    assert json.loads(Path(run, "qlora_dpo.json").read_text())["base_commit"] is None
    with pytest.warns(
        UserWarning, match="The weights of org/tiny are not those that the adapter was trained on.*Put those back"
    ):
        assert main(["evaluate", "--adapter", run, "--dataset_name", rows_file, *QUIET]) == 0


@pytest.mark.parametrize("changed", [False, True])
def test_a_base_that_was_changed_in_memory_is_said(base_folder, rows_file, tokenizer, tmp_path, recwarn, changed):
    base = load_base(base_folder)
    if changed:
        base.model.norm.weight.data.mul_(1.5)
    run = trained_in_memory(tmp_path / "run", base, tokenizer)
    assert main(["evaluate", "--adapter", run, "--dataset_name", rows_file, *QUIET]) == 0
    assert main(["score", "--adapter", run, "--source", rows_file, "--target", str(tmp_path / "scored")]) == 0
    evaluate_preferences(load_policy(run), Dataset.from_list(CHAT_ROWS), tokenizer)
    said = [warning for warning in recwarn if "not those that the adapter was trained on" in str(warning.message)]
    assert len(said) == 3 * changed


def test_what_a_model_computes_anew_is_no_weight_of_its_base(base_folder):
    """Buffers of rotary embeddings change as some models run, and where they are cast."""
    policy = load_policy(base_folder)
    before = {name: tensor.clone() for name, tensor in frozen_weights(policy).items()}
    policy.get_base_model().model.rotary_emb.inv_freq.mul_(2)
    assert not any("inv_freq" in name for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen_weights(policy).items())


def test_a_run_in_the_folder_of_another_is_not_judged_by_its_numbers(base_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    words = train_words(base_folder, rows_file, run)
    assert main([*words, "--sample_generations", "1", "--sample_max_new_tokens", "2"]) == 0
    assert (run / "generations.jsonl").is_file()
    place = words.index("--dataset_test_split")
    with pytest.warns(UserWarning, match="an adapter, which will be written over"):
        assert main([*words[:place], *words[place + 2 :], "--beta", "0.5"]) == 0
    assert not any((run / name).exists() for name in ("generations.jsonl", "evaluation/before", "evaluation/after"))
    found = json.loads((run / "metrics.json").read_text())
    assert set(found) == {"train", "adapter_sha256"}
    assert found["adapter_sha256"] == weights_hash(str(run))


def test_a_training_that_is_done_and_runs_again_changes_nothing(base_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    words = [*train_words(base_folder, rows_file, run), "--save_steps", "1"]
    words[words.index("--save_strategy") + 1] = "steps"
    assert main(words) == 0
    record, metrics = (json.loads((run / name).read_text()) for name in ("qlora_dpo.json", "metrics.json"))
    weights = (run / "adapter_model.safetensors").read_bytes()
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    again = json.loads((run / "metrics.json").read_text())
    assert again["train"]["train_loss"] == metrics["train"]["train_loss"]
    assert again["before"] == metrics["before"]
    assert json.loads((run / "qlora_dpo.json").read_text())["evaluations"] == record["evaluations"] != {}
    assert any("train_runtime" in line for line in json.loads((run / "trainer_state.json").read_text())["log_history"])


def test_an_evaluation_has_its_reference_in_as_many_bits_as_the_training(base_folder, rows_file, tmp_path):
    words = [*train_words(base_folder, rows_file, tmp_path / "run"), "--reference", base_folder]
    assert main([*words, "--reference_in_4bit", "false"]) == 0
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    for more in ([], ["--reference_in_4bit", "false"]):
        asked = ["evaluate", "--adapter", str(tmp_path / "run"), "--dataset_name", rows_file, *QUIET, *more]
        assert main([*asked, "--dataset_test_split", "train[8:]", "--output_dir", str(tmp_path / "eval")]) == 0
        found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
        assert found["eval_rewards/margins"] == pytest.approx(trained["eval_rewards/margins"], rel=1e-6)
    assert main([*asked[: -len(more)], "--reference", "base"]) == 0  # which is in as many bits as the policy
    words = ["score", "--adapter", str(tmp_path / "run"), "--source", rows_file, "--target", str(tmp_path / "s.jsonl")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that its reference has changed
        assert main(words) == 0


def test_json_on_stdout_is_nothing_else(base_folder, rows_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    capsys.readouterr()
    words = [
        "evaluate",
        "--adapter",
        str(run),
        "--dataset_name",
        rows_file,
        "--json",
        "--sample_generations",
        "2",
        *QUIET,
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["pairs"] == 12
    assert "policy, greedy" in said.err or "policy" in said.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_target_modules", "all-linear", "lm_head"], "`lora_target_modules` must be all-linear alone or names"),
        (
            ["--load_in_4bit", "false", "--bnb_4bit_quant_type", "fp4"],
            "`bnb_4bit_quant_type` must be nf4 without `load_",
        ),
        (["--bnb_4bit_quant_type", "int4"], "`bnb_4bit_quant_type` must be one of ['nf4', 'fp4'], got int4"),
        (["--model_init_kwargs", "[1]"], "`model_init_kwargs` must be a dict, or one as JSON, got '[1]'"),
        (["--model_init_kwargs", '{"quantization_config": null}'], "must be without `quantization_config` at the"),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
    ],
)
def test_a_mistake_in_what_is_loaded_is_one_line(base_folder, rows_file, tmp_path, capsys, more, said):
    assert main([*train_words(base_folder, rows_file, tmp_path / "run"), *more]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("qlora-dpo train: ")]
    assert said in line


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("logging_strategy: no", "logging_strategy", "no"),
        ("report_to: null", "report_to", []),
    ],
)
def test_no_in_yaml_is_no(tmp_path, line, name, value):
    """YAML reads it as false."""
    path = tmp_path / "options.yaml"
    path.write_text(f"output_dir: {tmp_path}\n{line}\n")
    (args,) = parse((QLoRADPOConfig,), ["--config", str(path)], "qlora-dpo train")
    assert getattr(args, name) == value


def test_an_option_that_must_be_given_is_not_null(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("model_name_or_path: null\ndataset_name: x.jsonl\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "`model_name_or_path` must be given, got null. Fill it in." in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_where_a_shell_leaves_it(base_folder, rows_file, tmp_path, monkeypatch):
    assert main(train_words(base_folder, rows_file, tmp_path / "run")) == 0
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    assert main(["evaluate", "--adapter=~/run", "--dataset_name", rows_file, *QUIET]) == 0
    assert main(["report", "~/run"]) == 0
    assert main(["merge", "--adapter=~/run", "--output_dir=~/merged"]) == 0
    assert (tmp_path / "run" / "evaluations").is_dir()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert not any((tmp_path / "here").iterdir())


def test_a_run_over_an_adapter_says_what_it_writes_over(base_folder, rows_file, tmp_path):
    words = train_words(base_folder, rows_file, tmp_path / "run")
    assert main(words) == 0
    with pytest.warns(UserWarning, match="holds an adapter, which will be written over, and this run begins anew"):
        assert main(words) == 0


def test_a_plan_without_a_card_says_how_to_name_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--model", "llama-3.2-1b"]) == 0
    assert "no GPU is here: add --gpu 24GB" in capsys.readouterr().err


OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
OWN_CONFIG = {
    "model_type": "own",
    "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
}


def test_a_model_with_code_of_its_own_goes_all_the_way(base_folder, rows_file, tmp_path, monkeypatch, capsys):
    """The merged model has the code beside it. Without the option it is not run."""
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    base, run, out = shutil.copytree(base_folder, tmp_path / "base"), str(tmp_path / "run"), tmp_path / "merged"
    for name, text in OWN_CODE.items():
        (base / name).write_text(text)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | OWN_CONFIG))
    trust = ["--trust_remote_code", "true"]
    assert main([*train_words(str(base), rows_file, run), *trust]) == 0
    words = {
        "evaluate": ["--dataset_name", rows_file, *QUIET],
        "score": ["--source", rows_file, "--target", str(tmp_path / "out.jsonl")],
        "merge": ["--output_dir", str(out), "--dataset_name", rows_file, "--num_rows", "2"],
    }
    found = {name: main([name, "--adapter", run, *more, *trust]) for name, more in words.items()}
    assert found == dict.fromkeys(words, 0), capsys.readouterr().err
    shutil.rmtree(base)
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    assert main(["merge", "--adapter", run, "--output_dir", str(tmp_path / "again"), "--base", str(out)]) == 2
    assert "`trust_remote_code=True`" in capsys.readouterr().err


def test_evaluate_uses_the_beta_of_the_adapter_unless_told(base_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    assert main([*train_words(base_folder, rows_file, run), "--beta", "0.5"]) == 0
    words = ["evaluate", "--adapter", str(run), "--dataset_name", rows_file, *QUIET]
    margins = []
    for more in ([], ["--beta", "1.0"]):
        assert main([*words, *more]) == 0
        found = json.loads((run / "evaluations" / "rows" / "metrics.json").read_text())
        margins.append(found["eval_rewards/margins"])
    assert margins[1] == pytest.approx(2 * margins[0], rel=1e-6)


def test_the_seed_decides_the_run(base_folder, rows_file, tmp_path):
    margins = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*train_words(base_folder, rows_file, tmp_path / name), "--seed", seed]) == 0
        margins[name] = json.loads((tmp_path / name / "metrics.json").read_text())["after"]["eval_rewards/margins"]
    assert margins["a"] == margins["b"] != margins["c"]


@pytest.mark.parametrize(("name", "kinds"), [("all-linear", 7), ("q_proj", 1)])
def test_one_name_of_layers_is_all_linear_or_a_layer(base_folder, rows_file, tmp_path, name, kinds):
    assert main([*train_words(base_folder, rows_file, tmp_path), "--lora_target_modules", name]) == 0
    adapted = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len({layer.split(".")[-1] for layer in adapted}) == kinds


def test_where_the_four_bits_are_kept_changes_no_number(base_folder, rows_file, tmp_path):
    margins, kept = [], []
    for name in ("uint8", "bfloat16"):
        assert main([*train_words(base_folder, rows_file, tmp_path / name), "--bnb_4bit_quant_storage", name]) == 0
        margins.append(json.loads((tmp_path / name / "metrics.json").read_text())["after"]["eval_rewards/margins"])
        record = json.loads((tmp_path / name / "qlora_dpo.json").read_text())
        kept.append(record["quantization"]["bnb_4bit_quant_storage"])
    assert margins[0] == margins[1] != 0
    assert kept == ["uint8", "bfloat16"]


def test_a_run_goes_on_from_its_last_checkpoint(base_folder, rows_file, tmp_path):
    words = train_words(base_folder, rows_file, tmp_path / "run")
    words[words.index("--save_strategy") + 1] = "steps"
    assert main([*words, "--save_steps", "1"]) == 0
    assert main([*words, "--save_steps", "1", "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_a_stopped_training_says_how_to_go_on_and_where_it_does(base_folder, rows_file, tmp_path, capsys, monkeypatch):
    words = [*train_words(base_folder, rows_file, tmp_path / "run"), "--save_steps", "1"]
    words[words.index("--save_strategy") + 1] = "steps"

    def stopped_after(steps):
        real = QLoRADPOTrainer.training_step

        def step(self, *args):
            if self.state.global_step == steps:
                raise KeyboardInterrupt
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(QLoRADPOTrainer, "training_step", step)
            assert main(words) == 130
        return capsys.readouterr().err.splitlines()[-1]

    assert stopped_after(0) == "qlora-dpo train: stopped, with no complete checkpoint. Run it again to begin anew."
    last = tmp_path / "run" / "checkpoint-1"
    assert stopped_after(1) == (
        f"qlora-dpo train: stopped; the last complete checkpoint is {last}. Run it again with --resume_from_checkpoint "
        "true to go on."
    )
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert capsys.readouterr().err.count(f"the training goes on from {last}\n") == 1


def test_a_stopped_scoring_says_how_to_go_on(rows_file, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "score_file", stopped)
    assert main(["score", "--adapter", "a", "--source", rows_file, "--target", "t"]) == 130
    assert capsys.readouterr().err == "\nqlora-dpo score: stopped. Run it again to go on.\n"
    monkeypatch.setitem(RUNS, "plan", stopped)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "\nqlora-dpo plan: stopped.\n"


def test_ranked_groups_train(base_folder, tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(ranked_row(seed)) + "\n" for seed in range(6)))
    words = [
        "train",
        "--model_name_or_path",
        base_folder,
        "--dataset_name",
        str(path),
        "--output_dir",
        str(tmp_path / "r"),
    ]
    assert main([*words, "--pair_strategy", "best_vs_rest", "--dtype", "float32", "--bf16", "false", *QUICK]) == 0
    assert (tmp_path / "r" / "adapter_model.safetensors").is_file()


CLASSES = (DataArguments, ModelArguments, QLoRADPOConfig)
REQUIRED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def parsed(tmp_path, options, *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(REQUIRED | options))
    return parse(CLASSES, ["--config", str(path), *flags], "qlora-dpo train")


def test_yaml_values_are_converted_as_the_command_line_does(tmp_path):
    """YAML 1.1 reads 5e-6 as a string."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 5e-6\nmax_length: null\nbf16: no\n"
    )
    _, _, args = parse(CLASSES, ["--config", str(path)], "qlora-dpo train")
    assert args.learning_rate == 5e-6
    assert args.max_length is None
    assert args.bf16 is False


@pytest.mark.parametrize("text", ["1e-6", "1.5e6"])
def test_a_number_without_a_point_or_a_sign_in_a_mapping_of_yaml_is_a_number(tmp_path, text):
    _, _, args = parsed(tmp_path, {"lr_scheduler_kwargs": {"min_lr": text}})
    assert args.lr_scheduler_kwargs == {"min_lr": float(text)}


def test_lists_and_mappings_in_yaml(tmp_path):
    _, model, args = parsed(
        tmp_path,
        {"lora_target_modules": ["q_proj", "v_proj"], "loss_type": ["hinge"], "lr_scheduler_kwargs": {"num_cycles": 2}},
    )
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert args.loss_type == ["hinge"]
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_flags_win_over_the_file(tmp_path):
    _, model, args = parsed(tmp_path, {"beta": 0.2, "lora_r": 8, "label_smoothing": 0.1}, "--beta", "0.3")
    assert (args.beta, model.lora_r, args.label_smoothing) == (0.3, 8, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1e-5}, "got `lerning_rate`. Did you mean `learning_rate`"),
        ({"xyzzy": 1}, "got `xyzzy`. Remove it"),
        ({"loss_type": "dpo"}, "`loss_type` must be one of"),
    ],
)
def test_unknown_options_in_yaml_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: {", "must be YAML, got while parsing .* Correct it"),
        ("- a", "must hold `option: value` lines, got list"),
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        parse(CLASSES, ["--config", str(path)], "qlora-dpo train")


def test_a_flag_is_not_guessed_from_its_beginning(tmp_path):
    with pytest.raises(ValueError, match=r"got --max_step 2\. Did you mean `max_steps`"):
        parsed(tmp_path, {}, "--max_step", "2")


def test_unknown_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be known, got --lerning_rate 1\. Did you mean `learning_rate`"):
        parsed(tmp_path, {}, "--lerning_rate", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--dataset_name": "./no.jsonl"}, "Check the path"),
        ({"--model_name_or_path": "./nowhere"}, "Check the path"),
        ({"--config": "./no.yaml"}, "Check the path"),
        ({"--lora_dropout": "0.1"}, "`lora_dropout` must be 0 while"),
        ({"--dtype": "int8"}, "`dtype` must be one of"),
        ({"--bnb_4bit_quant_storage": "int4"}, "`bnb_4bit_quant_storage` must be one of"),
        ({"--dataset_test_split": "test"}, "Use slices of it"),
        (
            {"--max_length": "3"},
            "all 8 were dropped (8: the prompt alone has max_length tokens or more). Raise `max_length`",
        ),
        ({"--activation_offloading": "true"}, "`activation_offloading` must be False"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(base_folder, rows_file, tmp_path, capsys, change, message):
    words = train_words(base_folder, rows_file, tmp_path / "run")
    for flag, value in change.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qlora-dpo train: ")
    assert message in last


def test_an_eval_strategy_without_a_test_split_names_the_option(base_folder, rows_file, tmp_path, capsys):
    words = [*train_words(base_folder, rows_file, tmp_path / "run"), "--eval_strategy", "steps"]
    at = words.index("--dataset_test_split")
    assert main(words[:at] + words[at + 2 :]) == 2
    assert (
        "`dataset_test_split` must be given with `eval_strategy`, got none with steps. Add" in capsys.readouterr().err
    )


def test_evaluating_a_folder_without_a_record_is_refused(tmp_path, rows_file, capsys):
    assert main(["evaluate", "--adapter", str(tmp_path), "--dataset_name", rows_file]) == 2
    assert "qlora_dpo.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--learning_rate", "3"], "learning_rate"),
        (["--max_steps=7"], "max_steps"),
        (["--push_to_hub"], "push_to_hub"),
        (["--loss_type", "ipo"], "loss_type"),
        (["--no_average_tokens_across_devices"], "average_tokens_across_devices"),
    ],
)
def test_an_option_that_an_evaluation_does_not_use_is_refused(tmp_path, capsys, words, name):
    words = ["evaluate", "--adapter", "a", "--dataset_name", "d", *words]
    assert main(words) == 2
    assert f"must be ones that it uses, got `{name}`. Remove it" in capsys.readouterr().err


def test_an_option_that_an_evaluation_does_not_use_is_refused_in_yaml_also_as_null(tmp_path, capsys):
    path = tmp_path / "e.yaml"
    path.write_text("adapter: a\ndataset_name: d\nlabel_names: null\n")
    assert main(["evaluate", "--config", str(path)]) == 2
    assert "got `label_names`" in capsys.readouterr().err


def test_help_of_evaluate_lists_what_an_evaluation_uses(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(QLoRADPOConfig):
        if field.init:
            assert (f"--{field.name} " in shown) == (field.name in EVALUATION_FIELDS), field.name
    assert {field.name for field in dataclasses.fields(QLoRADPOConfig)}.issuperset(EVALUATION_FIELDS)


def test_what_is_evaluated_instead_of_an_adapter_is_said(base_folder, rows_file, tmp_path, capsys):
    def said(adapter):
        assert main(["evaluate", "--adapter", str(adapter), "--dataset_name", rows_file]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    words = train_words(base_folder, rows_file, tmp_path / "run")
    words[words.index("--save_strategy") + 1] = "steps"
    assert main([*words, "--save_steps", "1"]) == 0
    (tmp_path / "run" / "qlora_dpo.json").unlink()
    last = tmp_path / "run" / "checkpoint-2"
    on = ", or finish the training with --resume_from_checkpoint true."
    assert f"{tmp_path / 'run'}, where a training was stopped. Name its last complete checkpoint, {last}{on}" in said(
        tmp_path / "run"
    )
    (last / "manifest.json").unlink()
    assert "checkpoint-1, or finish" in said(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    assert "an adapter that was not saved here. Save it with" in said(tmp_path / "run")
    assert f"got {base_folder}, a whole model. Name an adapter that was trained on it." in said(base_folder)
    assert "which holds no adapter. Check the path." in said(tmp_path)
    assert "must be a folder or a Hub id, got ./gone. Check the path." in said("./gone")
    assert "must be a folder or a Hub id, got gone: no such folder, and from the Hub" in said("gone")


def test_an_unknown_command_is_refused(capsys):
    assert main(["trian"]) == 2
    assert "got trian" in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qlora-dpo {qlora_dpo.__version__}\n"


def test_a_warning_is_one_line_while_a_command_runs(capsys, monkeypatch):
    def warn(_):
        warnings.warn("Something\nis odd.", stacklevel=2)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will", FutureWarning, stacklevel=2)
        print(warnings.formatwarning("Something\nis odd.", UserWarning, "cli.py", 7), end="")

    before = warnings.formatwarning
    monkeypatch.setitem(RUNS, "plan", warn)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert main(["plan"]) == 0
    assert [str(one.message) for one in found] == ["Something\nis odd."]
    assert capsys.readouterr().out == "qlora-dpo: warning: Something is odd.\n"
    assert warnings.formatwarning is before


def test_help_names_every_command(capsys):
    assert list(COMMANDS) == list(RUNS)
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: qlora-dpo {command}" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "qlora_dpo", "--help"], capture_output=True, text=True, check=True)
    assert "qlora-dpo COMMAND" in shown.stdout
    assert Path(sys.executable).exists()


# ---- adapters that go on, and adapters on adapters -------------------------------------------------------------------


def trained_in(folder, base_folder, rows_file, *words):
    assert main([*train_words(base_folder, rows_file, folder), "--learning_rate", "1e-2", *words]) == 0
    return str(folder)


def evaluated(adapter, rows_file, *words):
    split = ["--dataset_test_split", "train[8:]"]
    assert main(["evaluate", "--adapter", adapter, "--dataset_name", rows_file, *split, *QUIET, *words]) == 0
    folder = Path(adapter, "evaluations", f"{Path(rows_file).stem}-train-8_")
    return json.loads((folder / "metrics.json").read_text())


def test_an_adapter_that_was_continued_is_evaluated_against_its_start(base_folder, rows_file, tmp_path, capsys):
    sft = trained_in(tmp_path / "sft", base_folder, rows_file)
    again = trained_in(tmp_path / "again", sft, rows_file)
    record = json.loads(Path(again, "qlora_dpo.json").read_text())
    assert (record["reference"], record["reference_source"]) == ("initial", sft)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The reference")
        found = evaluated(again, rows_file)
    expected = json.loads(Path(again, "metrics.json").read_text())["after"]
    assert found["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert evaluated(again, rows_file, "--reference", "base")["eval_rewards/margins"] != pytest.approx(
        expected["eval_rewards/margins"], rel=1e-2
    )


def test_a_reference_adapter_that_has_changed_is_warned_about(base_folder, rows_file, tmp_path):
    sft = trained_in(tmp_path / "sft", base_folder, rows_file)
    again = trained_in(tmp_path / "again", sft, rows_file)
    trained_in(tmp_path / "sft", base_folder, rows_file, "--max_steps", "3")
    with pytest.warns(UserWarning, match="has changed since the adapter was trained .* Put the old one back"):
        evaluated(again, rows_file)


def test_a_stacked_adapter_is_evaluated_on_the_one_below_it(base_folder, rows_file, tmp_path):
    sft = trained_in(tmp_path / "sft", base_folder, rows_file)
    top = trained_in(tmp_path / "top", sft, rows_file, "--new_adapter", "true", "--lora_r", "2")
    record = json.loads(Path(top, "qlora_dpo.json").read_text())
    assert (record["reference"], record["stacked_on"], record["reference_source"]) == ("adapter", sft, sft)
    found = evaluated(top, rows_file)
    expected = json.loads(Path(top, "metrics.json").read_text())["after"]
    assert found["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert found["eval_logps/chosen"] == pytest.approx(expected["eval_logps/chosen"], rel=1e-5)


def test_a_reference_that_was_in_memory_only_is_asked_for(base_folder, rows_file, tmp_path, capsys):
    adapter = trained_in(tmp_path / "moving", base_folder, rows_file, "--sync_ref_model", "true")
    assert main(["evaluate", "--adapter", adapter, "--dataset_name", rows_file]) == 2
    assert "Name it, or another, with --reference" in capsys.readouterr().err
    evaluated(adapter, rows_file, "--reference", "base")


def test_a_run_is_drawn_as_one_file(base_folder, rows_file, tmp_path, capsys):
    run = trained_in(tmp_path / "run", base_folder, rows_file)
    assert main(["report", run]) == 0
    assert "report.html" in capsys.readouterr().out
    page = Path(run, "report.html").read_text()
    after = json.loads(Path(run, "evaluation", "after", "report.json").read_text())
    assert f"{after['accuracy']['value']:.3f}" in page
    assert "missing" not in page.lower() or "evaluation/before" not in page
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "`run_dir` must" in capsys.readouterr().err


def test_completions_are_scored_from_the_command_line(base_folder, rows_file, tmp_path, capsys):
    run = trained_in(tmp_path / "run", base_folder, rows_file)
    target = tmp_path / "scored.jsonl"
    assert main(["score", "--adapter", run, "--source", rows_file, "--target", str(target)]) == 0
    assert "12 rows scored" in capsys.readouterr().out
    assert len(target.read_text().splitlines()) == 12


def test_a_base_is_found_from_another_folder(base_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(base_folder).parent)
    assert main(train_words(Path(base_folder).name, rows_file, tmp_path / "run")) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--adapter", "run", "--dataset_name", rows_file, *QUIET]) == 0


def test_a_run_that_goes_on_is_not_judged_from_the_start_again(base_folder, rows_file, tmp_path):
    words = [*train_words(base_folder, rows_file, tmp_path / "run"), "--save_steps", "1", "--sample_generations", "1"]
    words[words.index("--save_strategy") + 1] = "steps"
    assert main([*words, "--sample_max_new_tokens", "2"]) == 0
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())["before"]
    assert main([*words, "--max_steps", "3", "--resume_from_checkpoint", "true", "--sample_max_new_tokens", "2"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["before"] == before
    lines = (tmp_path / "run" / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 3]
    with pytest.warns(UserWarning, match="holds checkpoints of another run, up to checkpoint-3"):
        assert main(words[:-2]) == 0


def test_a_missing_checkpoint_is_said_before_anything_is_loaded(rows_file, tmp_path, capsys):
    words = train_words("nowhere/to-be-found", rows_file, tmp_path / "run")
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    assert "must find a complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--new_adapter", "true"], []], ids=["stacked on it", "compared with it"])
def test_an_adapter_that_is_needed_later_is_not_written_over(base_folder, rows_file, tmp_path, capsys, more):
    run = tmp_path / "run"
    assert main(train_words(base_folder, rows_file, run)) == 0
    before = (run / "adapter_model.safetensors").read_bytes()
    assert main([*train_words(str(run), rows_file, run), *more]) == 2
    assert "which would be written over. Name a new one." in capsys.readouterr().err
    assert (run / "adapter_model.safetensors").read_bytes() == before


def test_rows_that_cannot_be_scored_are_counted_and_the_status_is_1_also_when_run_again(
    base_folder, rows_file, tmp_path, capsys
):
    run = trained_in(tmp_path / "run", base_folder, rows_file)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "the"}\n{"prompt": "the", "completions": [" cat"]}\n{"question": "a"}\n')
    for count in (1, 0):
        capsys.readouterr()
        assert main(["score", "--adapter", run, "--source", str(source), "--target", str(target)]) == 1
        shown = capsys.readouterr()
        assert shown.out == f"{count} rows scored into {target}{'' if count else ': none was left to score'}\n"
        assert "got 2 with an error" in shown.err
        assert "(first: row 0: A data set must have the columns" in shown.err
    assert len(target.read_text().splitlines()) == 3


@pytest.mark.parametrize("base", ["/gone/base", "me/gone"])
def test_a_recorded_base_that_cannot_be_found_is_named(base_folder, rows_file, tmp_path, capsys, base):
    path = Path(trained_in(tmp_path / "run", base_folder, rows_file), "qlora_dpo.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": base}))
    others = {
        "evaluate": ["--dataset_name", rows_file],
        "score": ["--source", rows_file, "--target", str(tmp_path / "t")],
    }
    for command, words in others.items():
        assert main([command, "--adapter", str(tmp_path / "run"), *words]) == 2
        shown = capsys.readouterr().err.splitlines()[-1]
        assert f"The base of the adapter {tmp_path / 'run'} must be" in shown
        assert f"got {base} from its qlora_dpo.json" in shown
        assert "write where it is as `base` into qlora_dpo.json" in shown


def test_every_help_text_is_written_once():
    texts = []
    for path in Path(qlora_dpo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                named = zip(node.keys, node.values, strict=True)
                texts += [text for key, text in named if isinstance(key, ast.Constant) and key.value == "help"]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_help":
                texts += node.args
    written = [text.value for text in texts if isinstance(text, ast.Constant)]
    assert len(written) > 100
    assert sorted(written) == sorted(set(written))


def test_options_that_mean_the_same_have_one_help_text():
    shared = {f.name: f.metadata["help"] for f in dataclasses.fields(QLoRADPOConfig) if "help" in f.metadata}
    found = {f.name: f.metadata["help"] for f in dataclasses.fields(cli.MemoryOptions)}
    for name in ("gradient_checkpointing", "activation_offloading", "precompute_ref_log_probs", "logps_chunk_size"):
        assert found[name] == shared[name]
    for command in (cli.ScoreArguments, cli.MergeArguments):
        assert command.__dataclass_fields__["trust_remote_code"].metadata["help"] == shared["trust_remote_code"]
