"""The model card: what it says, that the Hub's own reader takes it, and that it is made anew each time."""

import ast
import importlib
import json
import math
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.card import MARK, is_own, write_card
from qlora_dpo.cardtext import as_markdown, shown
from qlora_dpo.cli import MergeArguments, parse
from qlora_dpo.config import LOSS_FIELDS
from qlora_dpo.data import NO_PAIRS
from qlora_dpo.origins import base_licence, data_origin, named_origin, versions
from qlora_dpo.record import read_record

from tiny_chat import CHAT_ROWS


class NoDuplicates(yaml.SafeLoader):
    """YAML whose keys may not repeat: the usual loaders keep the last one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return super().construct_mapping(node, deep)


@pytest.fixture(scope="module")
def run(base_folder, tmp_path_factory):
    """A training from the command line, with an evaluation before and after."""
    folder = tmp_path_factory.mktemp("my runs")
    base, rows = folder / "secret-place" / "tiny-base", folder / "secret-place" / "rows.jsonl"
    shutil.copytree(base_folder, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    words = [
        "train", "--model_name_or_path", str(base), "--dataset_name", str(rows),
        "--output_dir", str(folder / "tiny-dpo"),
        "--dataset_train_split", "train[:8]", "--dataset_test_split", "train[8:]", "--learning_rate", "1e-2",
        "--report_to", "none", "--save_strategy", "steps", "--save_steps", "3", "--disable_tqdm", "true",
        "--max_steps", "3", "--logging_steps", "1", "--ld_alpha", "0.5", "--beta", "0.25",
    ]  # fmt: skip
    assert main(words) == 0
    return folder / "tiny-dpo"


@pytest.fixture
def adapter(run, tmp_path):
    """A copy of that run which a test may change."""
    return Path(shutil.copytree(run, tmp_path / "tiny-dpo"))


def text_of(folder):
    return (Path(folder) / "README.md").read_text()


def test_the_card_says_what_was_trained_on_what_and_how_well(run):
    text, report = text_of(run), json.loads((run / "evaluation" / "after" / "report.json").read_text())
    accuracy = report["accuracy"]
    interval = f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    for words in (
        "# tiny-dpo", "tiny-base", "NF4, double quantisation, bfloat16 compute", "rank 16, alpha 32", "`q_proj`",
        "loss `sigmoid`, beta 0.25", "| `ld_alpha` | 0.5 |", "| `learning_rate` | 0.01 |", "| steps | 3 |",
        "the base model, with its adapters disabled", "rows.jsonl, 8 rows", "split train\\[:8\\]", interval,
        f"{report['reference_accuracy']['value']:.3f}", "peak memory", "a second", "charts/loss.png",
        "PeftModel.from_pretrained(base, 'tiny-dpo')", "load_policy('tiny-base', adapter='tiny-dpo')",
        "qlora-dpo merge --adapter tiny-dpo --output_dir tiny-dpo-merged",
        "trained on: 8 groups, 8 pairs", "evaluated on: 4 groups, 4 pairs",
        "cut to fit the limits of tokens: 0.0 % of the rows",
        "vllm serve tiny-base --enable-lora --max-lora-rank 16", "## Limits",
        *(f"{package} {found}" for package, found in versions().items()),
    ):  # fmt: skip
        assert words in text, words
    assert set(versions()) >= {"torch", "transformers", "peft", "bitsandbytes"}
    for picture in re.findall(r"\]\((charts/.*?)\)", text):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def rewritten(folder, lora=None, **record):
    """The card of the adapter with other values in its record and in PEFT's config."""
    for name, values in (("qlora_dpo.json", record), ("adapter_config.json", lora or {})):
        found = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(found))
    write_card(str(folder), draw=False)
    return text_of(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": False},
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")},
        {"quantize_head": True},
    ],
    ids=str,
)
def test_the_way_to_load_gives_the_base_as_it_was_in_training(options, adapter, base_folder):
    trained = load_policy(base_folder, **options)
    quantization = getattr(trained.config, "quantization_config", None)
    text = rewritten(adapter, quantization=None if quantization is None else quantization.to_dict())
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    source = source.replace("'tiny-base'", repr(base_folder)).replace("'tiny-dpo'", repr(str(adapter)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a base in other bits
        loaded: dict = {}
        exec(source, loaded)  # it is the card's own
    head = type(trained.get_base_model().get_output_embeddings())
    found = loaded["policy"]
    assert type(found.get_base_model().get_output_embeddings()) is head
    assert getattr(found.config, "quantization_config", None) == quantization


def test_the_ways_to_load_bring_the_tokenizer(run):
    for source in re.findall(r"```python\n(.*?)```", text_of(run), re.DOTALL):
        assert "tokenizer = AutoTokenizer.from_pretrained('tiny-dpo')" in source


def test_the_commands_of_the_card_are_understood(adapter):
    """Whatever the adapter is called."""
    write_card(str(adapter), model_name="my run")
    commands = [shlex.split(line) for line in re.findall("^(?:qlora-dpo|vllm) .*", text_of(adapter), re.MULTILINE)]
    assert [command[:2] for command in commands] == [["qlora-dpo", "merge"], ["vllm", "serve"]]
    (merge,) = parse((MergeArguments,), commands[0][2:], "qlora-dpo merge")
    assert (merge.adapter, merge.output_dir) == ("my run", "my run-merged")
    assert commands[1][-1] == "my run=my run"


def test_options_that_the_loss_does_not_use_are_not_in_the_card(run, adapter):
    """A loss has its own hyperparameters; modifiers are shown where they are on."""
    shown = set(re.findall(r"^\| `(\w+)` \|", text_of(run), re.MULTILINE)) & set(LOSS_FIELDS)
    assert shown == {"beta", "label_smoothing", "ld_alpha"}
    loss = json.loads((adapter / "qlora_dpo.json").read_text())["loss"] | {"ld_alpha": None}
    loss |= {"loss_type": ["simpo", "cpo"], "f_divergence_type": "alpha_divergence", "use_weighting": True}
    text = rewritten(adapter, loss=loss)
    shown = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) & set(LOSS_FIELDS)
    modifiers = {"f_divergence_type", "f_alpha_divergence_coef", "use_weighting"}
    assert shown == {"beta", "simpo_gamma", "cpo_alpha"} | modifiers


def test_the_card_says_what_became_of_the_rows(base_folder, tokenizer, make_args):
    """Scores that tie give no pair, a long completion is cut, and rows are not what was trained on."""
    words = [" the", " a red", " a blue cat", " the" + " dog" * 20]
    rows = [{"prompt": "yes no", "completions": words[:3], "scores": [2.0, 1.0, 0.0]}] * 2
    rows += [{"prompt": "yes", "completions": words[:2], "scores": [1.0, 1.0]}]
    rows += [{"prompt": "no", "completions": words[2:], "scores": [1.0, 0.0]}]
    args = make_args(max_steps=1, max_length=12, pair_strategy="adjacent")
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    trainer.save_model()
    data = text_of(args.output_dir).split("## Data\n\n")[1].split("\n\n##")[0].splitlines()
    assert data[0].startswith("- train: unnamed data, 4 rows, fingerprint ")
    assert data[1:] == [
        "  - trained on: 3 groups, 5 pairs (a group is a prompt with its completions)",
        "  - pairs were made from its scores: every completion with the next worse",
        f"  - dropped: 1 row, because {NO_PAIRS}",
        "  - cut to fit the limits of tokens: 25.0 % of the rows",
    ]
    assert "| most tokens of prompt and completion | 12 |" in text_of(args.output_dir)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (12, 16), (300, 320)])
def test_the_rank_to_serve_is_one_that_vllm_takes(rank, served, adapter):
    assert f"--max-lora-rank {served} " in rewritten(adapter, {"r": rank})


@pytest.mark.parametrize(
    "lora", [{"r": 513}, {"rank_pattern": {"q_proj": 64}}, {"use_dora": True}, {"bias": "all"}], ids=str
)
def test_what_vllm_does_not_serve_has_no_command(lora, adapter):
    """It scales every layer by one rank, whatever a pattern says."""
    text = rewritten(adapter, lora)
    assert "vllm" not in text
    assert "qlora-dpo merge" in text


def test_a_pattern_of_targets_stays_in_its_cell(adapter):
    text = rewritten(adapter, {"target_modules": r".*(q_proj|v_proj)"})
    assert r"on `.*(q_proj\|v_proj)` |" in text


def test_no_path_of_this_machine_is_in_a_card(run):
    for card in run.rglob("README.md"):
        assert "secret-place" not in card.read_text()
        assert str(run.parent) not in card.read_text()


def test_the_python_of_the_card_is_python_whose_imports_are_there(run):
    sources = re.findall(r"```python\n(.*?)```", text_of(run), re.DOTALL)
    imports = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imports} == {"qlora_dpo", "peft", "transformers"}
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_head_is_what_the_hub_reads(run):
    card, report = ModelCard.load(run / "README.md"), run / "evaluation" / "after" / "report.json"
    data, judged = card.data, json.loads(report.read_text())
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "other")
    assert (data["license_name"], data["license_link"]) == ("tiny", "LICENSE")
    assert {"dpo", "qlora-dpo", "lora", "sigmoid"} <= set(data.tags)
    assert data.base_model is None  # a folder is no id: the Hub would take it for somebody's model
    accuracy, margin = data.eval_results
    assert (data.model_name, accuracy.metric_type, accuracy.dataset_name) == ("tiny-dpo", "accuracy", "rows.jsonl")
    assert accuracy.metric_value == judged["accuracy"]["value"]
    assert accuracy.metric_args["low"] == judged["accuracy"]["low"]
    assert margin.metric_value == pytest.approx(judged["margin"]["mean"])
    index = metadata_load(run / "README.md")["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    head = text_of(run).split("---\n")[1]
    assert yaml.load(head, NoDuplicates) == metadata_load(run / "README.md")
    assert str(ModelCard(str(card))) == str(card)


def test_ids_of_base_and_data_are_in_the_head(adapter):
    record = json.loads((adapter / "qlora_dpo.json").read_text())
    record |= {"base": "Qwen/Qwen2.5-7B", "base_revision": "v1", "base_commit": "ab" * 20, "licence": {}}
    origin = {"name": "trl-lib/uf", "id": "trl-lib/uf", "revision": "cd" * 20, "config": "default", "split": "train"}
    record["datasets"] = {"train": origin, "eval": origin | {"split": "test"}}
    (adapter / "qlora_dpo.json").write_text(json.dumps(record))
    write_card(str(adapter), "me/uf-dpo", tags="mine", language="en", license="mit")
    data = ModelCard.load(adapter / "README.md").data
    assert (data.base_model, data["base_model_relation"]) == ("Qwen/Qwen2.5-7B", "adapter")
    assert (data.datasets, data.license, data.language) == (["trl-lib/uf"], "mit", "en")
    assert "mine" in data.tags
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == ("trl-lib/uf", "test", "cd" * 20)
    text = text_of(adapter)
    assert f"Qwen/Qwen2.5-7B (revision v1, commit {'ab' * 20})" in text
    assert "from_pretrained('Qwen/Qwen2.5-7B', revision='v1')" in text
    assert "me/uf-dpo" in text


def test_every_save_makes_the_card_anew(adapter):
    first = text_of(adapter)
    for _ in range(2):
        (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n")
        write_card(str(adapter))
        assert text_of(adapter) == first


def test_a_broken_card_in_the_folder_or_a_card_that_cannot_be_made_stops_no_save(
    base_folder, tokenizer, make_args, monkeypatch
):
    """PEFT reads the card that is there before it saves, and raises if its head is not YAML."""
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args()
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, rows, None, tokenizer)
    Path(args.output_dir, "README.md").write_text("---\n: [broken\n---\n")
    trainer.save_model()
    assert MARK in text_of(args.output_dir)
    monkeypatch.setattr("qlora_dpo.card.make_card", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"could not be written \(ZeroDivisionError"):
        trainer.save_model()
    assert Path(args.output_dir, "adapter_model.safetensors").is_file()


def test_a_card_that_a_person_took_over_is_known(tmp_path):
    path = tmp_path / "README.md"
    for text, own in ((f"---\n---\n{MARK}\n# x", False), ("# Model Card for Model ID", False), ("# Mine", True)):
        path.write_text(text)
        assert is_own(path) is own
    assert not is_own(tmp_path / "none.md")


def test_checkpoints_have_a_card_of_their_own_without_charts(run):
    text = text_of(run / "checkpoint-3")
    assert "# tiny-dpo" in text
    assert "![" not in text
    assert "Model Card for Model ID" not in text


def test_an_evaluation_set_called_train_is_not_the_training_data(base_folder, tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    args, sets = make_args(), {"train": rows.select(range(3)), "test": rows.select(range(3, 5))}
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, rows, sets, tokenizer)
    trainer.evaluate()
    trainer.save_model()
    record = read_record(args.output_dir)
    assert [(use, origin["rows"]) for use, origin in record.datasets.items()] == [
        ("train", 12), ("eval_train", 3), ("eval_test", 2),
    ]  # fmt: skip
    assert {use: found["groups"] for use, found in record.evaluations.items()} == {"eval_train": 3, "eval_test": 2}
    assert trainer.data_reports["train"].groups == 12


def test_the_card_has_only_evaluations_of_these_weights(base_folder, tokenizer, make_args, tmp_path):
    """An evaluation before training, or at an earlier step, says nothing of the weights that are saved."""
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args(max_steps=2, learning_rate=1e-2)
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, rows, {"a": rows, "b|x": rows}, tokenizer)
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    assert "These weights were not evaluated." in text_of(args.output_dir)
    found = trainer.evaluate()
    trainer.save_model()
    text = text_of(args.output_dir)
    assert "| a | 12 |" in text
    assert "| b\\|x | 12 |" in text
    assert "unnamed data, 12 rows" in text  # the training set
    _, results = model_index_to_eval_results(metadata_load(Path(args.output_dir, "README.md"))["model-index"])
    values = [one.metric_value for one in results if one.metric_type == "accuracy"]
    assert values == [found["eval_a_rewards/accuracies"], found["eval_b|x_rewards/accuracies"]]
    assert "README" not in json.dumps(trainer.prepared.origins)


def recorded(args):
    """What the record of a run says of each set and evaluation: rows, and pairs."""
    record = json.loads(Path(args.output_dir, "qlora_dpo.json").read_text())
    rows = {name: origin["rows"] for name, origin in record["datasets"].items()}
    return rows, {name: found["pairs"] for name, found in record["evaluations"].items()}


def test_an_evaluation_of_other_rows_has_their_origin_and_leaves_that_of_the_others(base_folder, tokenizer, make_args):
    train, own, other, third = (Dataset.from_list(CHAT_ROWS[:n]) for n in (8, 5, 7, 3))
    args = make_args(max_steps=1)
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, train, own, tokenizer)
    trainer.evaluate(other)  # a look before the training, under the name of the trainer's own set
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(other, metric_key_prefix="test")
    trainer.evaluate({"x": third}, metric_key_prefix="test")
    trainer.evaluate(third, metric_key_prefix="train")
    trainer.save_model()
    rows = {"eval": 5, "test": 7, "test_x": 3, "eval_train": 3}
    assert recorded(args) == ({"train": 8} | rows, rows)
    trainer.evaluate(metric_key_prefix="test")
    trainer.evaluate(other)
    trainer.save_model()
    assert recorded(args) == ({"train": 8} | rows | {"eval": 7, "test": 5}, rows | {"eval": 7, "test": 5})


def test_sets_by_name_keep_their_origins_whatever_they_are_called(base_folder, tokenizer, make_args):
    rows, args = Dataset.from_list(CHAT_ROWS), make_args(max_steps=1)
    sets = {name: rows.select(range(n)) for n, name in enumerate(("train", "eval", "eval_b"), 2)}
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, rows, sets, tokenizer)
    trainer.train()
    trainer.evaluate({"b": rows, "eval_b": rows})
    trainer.evaluate()
    trainer.save_model()
    found = {"eval_train": 2, "eval_eval": 3, "eval_eval_b": 4, "eval_b": 12}
    assert recorded(args) == ({"train": 12} | found, found)


def test_the_card_of_the_best_weights_has_their_evaluation(base_folder, tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args(
        max_steps=3, learning_rate=1e-2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, None, rows, rows, tokenizer)
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_global_step == 1
    line = next(line for line in trainer.state.log_history if line["step"] == 1 and "eval_loss" in line)
    record = json.loads(Path(args.output_dir, "qlora_dpo.json").read_text())
    assert record["evaluations"]["eval"]["margin"] == pytest.approx(line["eval_rewards/margins"], rel=1e-6)


def test_a_later_evaluation_joins_the_card_if_it_is_of_these_weights(adapter, run):
    rows = run.parent / "secret-place" / "rows.jsonl"
    for split in ("train[:6]", "train[6:]"):
        words = ["evaluate", "--adapter", str(adapter), "--dataset_name", str(rows), "--dataset_test_split", split]
        assert main([*words, "--report_to", "none", "--disable_tqdm", "true"]) == 0
    folders = {folder.name for folder in (adapter / "evaluations").iterdir()}
    assert folders == {"rows-train-_6", "rows-train-6_"}
    write_card(str(adapter))
    for split in ("train[:6]", "train[6:]"):
        assert f"| rows.jsonl {split} | 6 |" in text_of(adapter)
    assert "secret-place" not in text_of(adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    write_card(str(adapter))
    assert "train[:6]" not in text_of(adapter)


def test_an_evaluation_that_is_not_finite_is_no_result(base_folder, tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, make_args(), None, None, rows, tokenizer)
    trainer.evaluate()
    records = trainer.last_pairs
    records._table[0, :] = math.nan
    assert records.evaluation() == {}


def test_text_from_data_breaks_no_table_and_no_page():
    assert as_markdown("a|b\n<script>*x*`y`") == r"a\|b \<script\>\*x\*\`y\`"


def test_of_a_path_the_last_part_is_shown(tmp_path):
    assert shown(str(tmp_path)) == tmp_path.name
    assert shown("/no/such/folder") == "folder"
    assert shown("user/name") == "user/name"
    assert shown("user/name@v1") == "user/name@v1"


# ---- origins ---------------------------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_is_known_by_its_file_in_the_cache(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    rows = Dataset.from_list([{"a": 1}])
    file = f"/cache/datasets/Some-Org___ultra_feedback/default/0.0.0/{commit}/ultra_feedback-train.arrow"
    monkeypatch.setattr(type(rows), "cache_files", property(lambda self: [{"filename": file}]))
    monkeypatch.setattr("qlora_dpo.origins.constants.HF_HUB_CACHE", str(tmp_path))
    found = data_origin(rows)
    assert (found["name"], found["revision"], found["config"]) == ("Some-Org/ultra_feedback", commit, "default")
    assert "id" not in found  # `ultra_feedback` may be written otherwise
    (tmp_path / "datasets--Some-Org--UltraFeedback" / "snapshots" / commit).mkdir(parents=True)
    assert data_origin(rows)["id"] == "Some-Org/UltraFeedback"


def test_rows_from_memory_have_no_name():
    found = data_origin(Dataset.from_list([{"a": 1}, {"a": 2}]))
    assert set(found) == {"rows", "fingerprint"}


def test_a_data_set_is_named_by_its_id_or_by_the_last_part_of_its_path(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    assert named_origin({}, str(tmp_path / "x.jsonl")) == {"name": "x.jsonl"}
    assert named_origin({}, "org/name", "c") == {"name": "org/name", "id": "org/name", "config": "c"}


def test_a_licence_that_is_not_known_is_left_out(tmp_path):
    assert base_licence(str(tmp_path)) == {}
    assert base_licence("no/such-model") == {}
