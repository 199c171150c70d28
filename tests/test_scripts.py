"""The developer scripts that build what measurements need."""

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

from qlora_dpo import load_policy
from qlora_dpo.__main__ import main
from qlora_dpo.memory import GIB

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2, tied": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_is_a_four_bit_model_that_loads(name, tokenizer, tmp_path, monkeypatch):
    shape, words, made = (str(tmp_path / part) for part in ("shape", "words", "made"))
    CONFIGS[name].save_pretrained(shape)
    tokenizer.save_pretrained(words)
    options = {"config": shape, "tokenizer": words, "output_dir": made}
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["make_shape.py", *flags])
    runpy.run_path(str(SCRIPTS / "make_shape.py"), run_name="__main__")

    policy = load_policy(made)
    base = policy.get_base_model()
    assert sum(isinstance(module, Linear4bit) for module in base.modules()) == 14
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert (base.lm_head.weight is base.get_input_embeddings().weight) == CONFIGS[name].tie_word_embeddings
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    written = json.loads(Path(made, "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written.values()) == {path.name for path in Path(made).glob("*.safetensors")}


@pytest.fixture
def capped_run(monkeypatch):
    """The script as a module, on a GPU of 10 GiB of which this process's context takes one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("capped_run")
    shares = []
    gpu = {
        "is_available": lambda: True,
        "mem_get_info": lambda: (9 * GIB, 10 * GIB),
        "set_per_process_memory_fraction": shares.append,
        "get_device_name": lambda: "a card",
        **{name: lambda: 3 * GIB for name in ("max_memory_allocated", "max_memory_reserved")},
        "memory_reserved": lambda: 0,
    }
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: torch.empty(shape))
    return module, shares


def test_a_capped_run_leaves_the_context_its_place_and_keeps_the_log(capped_run, tmp_path, monkeypatch, capsys):
    module, shares = capped_run
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 0.5}]}')
    ran = []
    monkeypatch.setattr(module, "qlora_dpo", lambda words: ran.append(words) or 0)
    output, command = tmp_path / "capped.json", ["train", "--output_dir", str(tmp_path)]
    assert module.main(["--gpu", "8GB", "--output", str(output), "--", *command]) == 0
    assert (ran, shares) == ([command], [0.7])
    found = json.loads(output.read_text())
    assert (found["status"], found["taken_bytes"], found["log"]) == (0, 4 * GIB, [{"loss": 0.5}])
    assert "4.00 of 8.00 GiB taken" in capsys.readouterr().out


def test_what_was_taken_is_kept_when_memory_runs_out_and_an_older_log_is_not_its(capped_run, tmp_path, monkeypatch):
    module, _ = capped_run
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 0.5}]}')

    def full(words):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "qlora_dpo", full)
    output = tmp_path / "capped.json"
    words = ["--gpu", "8GB", "--output", str(output), "--", "train", "--output_dir", str(tmp_path)]
    assert module.main(words) == 1
    found = json.loads(output.read_text())
    assert (found["status"], found["taken_bytes"], found["log"]) == (None, 4 * GIB, None)
    monkeypatch.setattr(module, "qlora_dpo", lambda words: 2)
    assert module.main(words) == 2
    assert json.loads(output.read_text())["log"] is None


@pytest.mark.parametrize("size", ["1GB", "11GB"])
def test_a_cap_that_is_none_is_refused(capped_run, size):
    module, _ = capped_run
    with pytest.raises(ValueError, match=r"must lie between 1\.00 and 10\.00 GiB"):
        module.main(["--gpu", size, "--", "train"])


def test_a_cap_needs_a_gpu(capped_run, monkeypatch, capsys):
    module, _ = capped_run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        module.main(["--gpu", "8GB", "--", "train"])
    assert "no GPU" in capsys.readouterr().err


STAND_IN = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
case "$*" in
  *$FAILING*) exit 1 ;;
esac
while [ $# -gt 0 ]; do
  [ "$1" = --output_dir ] && mkdir -p "$2" && echo '{}' > "$2/config.json" && echo '{}' > "$2/metrics.json"
  shift
done
"""


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    """Runs a copy of the script with a stand-in for Python; gives its exit status, what it printed, and the calls."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("results", "__pycache__"))
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*stages, failing="nothing"):
        log.write_text("")
        surroundings = {"PYTHON": python, "LOG": log, "FAILING": failing, "WORK_DIR": tmp_path / "work"}
        command = ["bash", str(tmp_path / "scripts" / "gpu_check.sh"), str(python), "words", *stages]  # a file as data
        environment = os.environ | {name: str(value) for name, value in surroundings.items()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, log.read_text().splitlines()

    return run


def test_the_gpu_check_goes_through_every_stage_and_makes_each_shape_once(gpu_check):
    status, printed, calls = gpu_check()
    assert status == 0
    assert "all stages passed" in printed
    shapes = [call.split()[2] for call in calls if "make_shape.py" in call]
    assert shapes == ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"]
    capped = [
        re.search(r"--gpu (\w+) .*recipes/([\w.-]+).yaml", call).groups() for call in calls if "capped_run" in call
    ]
    assert [f"{size.lower()}-{recipe.split('-', 1)[1]}" for size, recipe in capped] == [name for _, name in capped]
    assert len(capped) == 3
    for script in (
        "pytest tests/test_gpu.py -m gpu",
        "qlora_dpo demo",
        "memory_ladder.py",
        "bench_vs_trl.py",
        "scaling.py",
    ):
        assert any(script in call for call in calls), script


def test_a_stage_of_the_gpu_check_that_fails_is_said_and_the_next_one_runs(gpu_check):
    status, printed, calls = gpu_check("tests", "scaling", "bench", failing="scaling.py")
    assert status == 1
    assert "failed: scaling\n" in printed
    assert any("bench_vs_trl.py" in call and "--unsloth" in call for call in calls)
    assert gpu_check("demo", failing="get_device_name")[0] == 2
    status, _, calls = gpu_check("bench", failing="find_spec")
    assert status == 0
    assert any("bench_vs_trl.py" in call and "--unsloth" not in call for call in calls)
    status, printed, calls = gpu_check("tests", "testing")
    assert (status, len(calls)) == (2, 1)  # the GPU was asked for, no stage was run
    assert "there is no stage testing" in printed


@pytest.mark.parametrize("recipe", [path.stem for path in sorted((SCRIPTS.parent / "examples/recipes").glob("*.yaml"))])
def test_the_options_of_a_capped_recipe_are_a_training(recipe, base_folder, rows_file, tmp_path, monkeypatch):
    """As `gpu_check.sh` gives them, on a model that a CPU can train."""
    monkeypatch.chdir(SCRIPTS.parent)
    script = (SCRIPTS / "gpu_check.sh").read_text().replace("\\\n", " ")
    found = re.search(r" train --config .*--output_dir", script)[0]
    for name, value in {"$1": recipe, "$model": base_folder, "$data": rows_file}.items():
        found = found.replace(name, value)
    words = shlex.split(found)
    assert main([*words, str(tmp_path / "run")]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in line for line in history) == 3


@pytest.mark.slow
def test_every_rung_of_the_memory_ladder_is_foretold(tmp_path, monkeypatch, capsys):
    output = tmp_path / "ladder.json"
    monkeypatch.syspath_prepend(str(SCRIPTS))
    words = ["--tokens", "512", "1024", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["memory_ladder.py", *words])
    runpy.run_path(str(SCRIPTS / "memory_ladder.py"), run_name="__main__")
    rows = json.loads(output.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [512] * 7 + [1024] * 7
    for row in rows:
        assert row["peak_plan_over_measured"] == pytest.approx(1, abs=0.1), row["option"]
        assert row["planned_held_bytes"] == pytest.approx(row["held_bytes"], rel=5e-3), row["option"]
        if row["tokens"] == 1024:
            assert row["planned_step_bytes"] == pytest.approx(row["step_bytes"], rel=0.1), row["option"]
    sizes = {row["option"]: row["step_bytes"] for row in rows if row["tokens"] == 1024}
    assert sizes["no checkpointing"] > sizes["keep_layers=4"] > sizes["gradient_checkpointing"]
    assert sizes["gradient_checkpointing"] > sizes["and max_tokens_per_forward=512"]
    assert "| gradient_checkpointing | 1,024 |" in capsys.readouterr().out
