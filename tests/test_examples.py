"""The examples run, and what they say of their adapters is so."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from qlora_dpo import load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.memory import SAVERS
from qlora_dpo.model import load_base

from tiny_chat import ranked_row

EXAMPLES = Path(__file__).parent.parent / "examples"
SAVING_OPTIONS = [name for saver in SAVERS for name in saver.change]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with options, as from a command line; returns what it printed."""

    def run(name, **options):
        words = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr()

    return run


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[9, 10, 11, 12]])).logits


def test_dpo(run, base_folder, rows_file, tmp_path):
    options = {"dataset": rows_file, "test_split": "train[:3]", "output_dir": tmp_path / "run", "max_steps": 2}
    assert "accuracy" in run("dpo.py", model=base_folder, **options).out
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_sft_then_dpo(run, base_folder, rows_file, tmp_path):
    said = run("sft_then_dpo.py", model=base_folder, dataset=rows_file, output_dir=tmp_path, max_steps=2).err
    starts = [line for line in said.splitlines() if line.startswith("policy:")]
    assert "as it was at the start (frozen copy); largest step-0 margin: 0 nats (exactly 0)" in starts[0]
    assert f"the base with the frozen adapter {tmp_path}/sft" in starts[1]
    assert starts[1].endswith("largest step-0 margin: 0 nats (exactly 0)")

    sft, continued, stacked = (str(tmp_path / name) for name in ("sft", "dpo-continued", "dpo-stacked"))
    plain = PeftModel.from_pretrained(load_base(base_folder), continued)
    assert torch.equal(logits(plain), logits(load_policy(continued)))

    both = PeftModel.from_pretrained(load_base(base_folder), sft, adapter_name="sft")
    both.load_adapter(stacked, adapter_name="dpo")
    both.base_model.set_adapter(["sft", "dpo"])
    assert torch.equal(logits(both), logits(load_policy(base_folder, adapter=stacked)))
    assert not torch.equal(logits(both), logits(plain))


@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce"])
def test_ranked_completions(run, base_folder, tmp_path, loss):
    rows = tmp_path / "rows.jsonl"
    ranked = [ranked_row(seed, 4) for seed in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    options = {"model": base_folder, "max_steps": 2, "loss_type": loss, "output_dir": tmp_path / "run"}
    run("ranked_completions.py", dataset=rows, **options)
    assert json.loads((tmp_path / "run" / "qlora_dpo.json").read_text())["loss"]["loss_type"] == [loss]


def test_ranked_completions_brings_its_own_rows(run, base_folder, tmp_path):
    said = run("ranked_completions.py", model=base_folder, max_steps=1, output_dir=tmp_path / "run").err
    assert "train data: 16 rows" in said


def test_reward_scoring(run, base_folder, rows_file, tmp_path):
    options = {"dataset": rows_file, "test_split": "train[:3]", "output_dir": tmp_path / "run", "max_steps": 2}
    run("dpo.py", model=base_folder, **options)
    assert "of 12 rows have a margin" in run("reward_scoring.py", adapter=tmp_path / "run", rows=rows_file).out
    ranked = tmp_path / "ranked.jsonl"
    rows = [{key: row[key] for key in ("prompt", "completions")} for row in map(ranked_row, range(3))]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("reward_scoring.py", adapter=tmp_path / "run", rows=ranked).out.count("best first [") == 3


def test_the_example_runs_on_several_processes(base_folder, rows_file, tmp_path):
    """The first command for several GPUs, on two CPUs."""
    text = (EXAMPLES / "multi_gpu" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("torchrun ")]
    launcher, script = line.removeprefix("torchrun ").split(" examples/dpo.py ")
    options = {"model": base_folder, "dataset": rows_file, "test_split": "train[:3]", "max_steps": 1}
    words = [part for key, value in (options | {"output_dir": tmp_path}).items() for part in (f"--{key}", str(value))]
    assert script.split()[0] in words
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher.split(), "--master_port", "29695",
         str(EXAMPLES / "dpo.py"), *words],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "qlora_dpo.json").read_text())["training"]["processes"] == 2


def test_accelerate_configs_are_read():
    from accelerate.commands.config.config_args import ClusterConfig

    for path in (EXAMPLES / "multi_gpu").glob("*.yaml"):
        assert (
            ClusterConfig.from_yaml_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
        )


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plan_says_that_a_recipe_fits_its_card(path, capsys):
    """With a twentieth of the card to spare, and with the options of the recipe and no others."""
    text = path.read_text()
    recipe = yaml.safe_load(text)
    (command,) = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# qlora-dpo plan")]
    _, _, *words = shlex.split(command)
    asked = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert asked.pop("model") in recipe["model_name_or_path"].lower()
    assert asked.pop("gpu") == path.stem.split("-")[0].upper()
    assert asked.pop("tokens") == str(recipe["max_tokens_per_forward"])
    options = {name: str(recipe[name]).lower() for name in SAVING_OPTIONS if name in recipe}
    assert asked == options
    assert recipe["lora_r"] == 16  # the plan's default
    assert 2 * recipe["max_length"] <= recipe["max_tokens_per_forward"]  # a pair is one forward

    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["peak_bytes"] < 0.95 * plan["gpu_bytes"]


def test_there_is_a_recipe_for_every_size_of_card():
    sizes = {path.stem.split("-")[0] for path in (EXAMPLES / "recipes").glob("*.yaml")}
    assert sizes == {"8gb", "12gb", "16gb", "24gb", "48gb"}
