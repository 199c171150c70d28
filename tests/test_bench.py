"""The benchmark against TRL runs, trains both sides on the same tokens from the same start, and keeps all numbers."""

import importlib
import json
from pathlib import Path

import pytest

from tiny_chat import chat_row, ranked_row

pytest.importorskip("trl", reason="the extra `bench` is not installed")

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_vs_trl.py"
LOG_2 = 0.693147


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("bench_vs_trl")


@pytest.fixture
def report_of(bench, base_folder, tmp_path, monkeypatch):
    """Runs the benchmark on rows and reads what it wrote."""

    def run(rows, *options):
        data, output = tmp_path / "rows.jsonl", tmp_path / "bench.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["--data", str(data), "--model", base_folder, "--output", str(output), "--dtype", "float32"]
        words += ["--steps", "1", "--repeats", "1", "--checkpointing", "off", "--learning_rate", "1e-3", *options]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert bench.main(words) == 0
        return json.loads(output.read_text())

    return run


def groups(count):
    """Rows of four completions and three pairs."""
    keep = ("prompt", "completions")
    return [{key: ranked_row(seed)[key] for key in keep} | {"pairs": [[0, 1], [0, 2], [3, 1]]} for seed in range(count)]


def check(report, pairs_per_step):
    ours, trl, as_is = report["runs"]
    assert [run["side"] for run in report["runs"]] == ["ours", "trl", "trl_as_is"]
    assert ours["losses"] == pytest.approx(trl["losses"], abs=1e-3)
    assert ours["grad_norms"] == pytest.approx(trl["grad_norms"], rel=1e-3)
    assert ours["losses"][0] == pytest.approx(LOG_2, abs=1e-5)
    assert abs(ours["losses"][1] - LOG_2) > 1e-3
    assert ours["num_tokens"] == trl["num_tokens"] == as_is["num_tokens"]
    assert ours["num_unique_tokens"][1:] == report["work"]["unique_tokens"]
    assert ours["pairs_hash"] == trl["pairs_hash"] == as_is["pairs_hash"]
    assert ours["adapter_hash"] == trl["adapter_hash"] != as_is["adapter_hash"]
    assert [run["adapter_dtype"] for run in report["runs"]] == ["float32", "float32", "bfloat16"]
    assert ours["layout"] == "tree"
    for run in report["runs"]:
        assert run["pairs_per_second"] == pytest.approx(pairs_per_step / run["step_seconds"][0])
        assert run["begin_to_end_seconds"][0] <= run["step_seconds"][0]
    (found,) = report["summary"]
    assert found["differences"]["trl"]["losses"] < 1e-3
    assert found["failed"] == []
    for name, row in found["measures"].items():
        assert row["ours/trl"]["median"] == pytest.approx(ours[name] / trl[name])
        assert row["ours/trl_as_is"]["median"] == pytest.approx(ours[name] / as_is[name])
    assert {"date", "command", "versions", "python", "cpu", "cores", "threads", "gpu", "data", "rows"} <= set(report)
    assert report["versions"]["trl"] == "1.16.0"


def test_pairs_agree_with_trl_each_run_in_its_own_process(report_of, capsys):
    long = chat_row(0) | {"prompt": [{"role": "user", "content": "the cat " * 40}]}
    report = report_of([long, *(chat_row(seed) for seed in range(5))], "--batch_size", "2", "--max_length", "60")
    check(report, pairs_per_step=2)
    counts = report["rows"]
    assert (counts["rows"], counts["dropped_by_ours"], counts["dropped_by_trl"], counts["usable"]) == (6, 1, 1, 5)
    assert all(run["peak_above_model_gib"] > 0 for run in report["runs"])
    printed = capsys.readouterr().out
    assert "TRL as it is, bfloat16" in printed
    assert "gradient checkpointing off" in printed


def test_groups_agree_with_trl_on_their_unrolled_pairs(bench, report_of, monkeypatch):
    monkeypatch.setattr(bench, "run_in_process", bench.run_one)
    other = groups(4)[-1] | {"pairs": [[0, 1]]}
    report = report_of([*groups(3), other])
    check(report, pairs_per_step=3)
    assert report["rows"]["other_number_of_pairs"] == 1
    assert report["work"]["batch_size"] == 1


STAND_IN_FOR_UNSLOTH = """
import sys

assert "trl" not in sys.modules  # what it patches must come after it

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def PatchDPOTrainer():
    pass


class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, max_seq_length, dtype, load_in_4bit):
        four_bit = BitsAndBytesConfig(
            load_in_4bit=load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bit, dtype=dtype), None

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, **lora):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
"""


@pytest.mark.slow
def test_unsloth_is_measured_beside_them_in_a_process_that_it_may_patch(report_of, tmp_path, monkeypatch, capsys):
    """With a module of its name that loads the same model: that it comes first, and starts where the others do."""
    (tmp_path / "unsloth.py").write_text(STAND_IN_FOR_UNSLOTH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = report_of([chat_row(seed) for seed in range(4)], "--batch_size", "2", "--unsloth", "--as_is_repeats", "0")
    ours, trl, unsloth = report["runs"]
    assert [run["side"] for run in report["runs"]] == ["ours", "trl", "unsloth"]
    assert unsloth["losses"] == pytest.approx(ours["losses"], abs=1e-3)
    assert unsloth["adapter_hash"] == ours["adapter_hash"] == trl["adapter_hash"]
    assert unsloth["pairs_hash"] == ours["pairs_hash"]
    (found,) = report["summary"]
    assert found["measures"]["pairs_per_second"]["ours/unsloth"]["median"] > 0
    assert "ours/Unsloth" in capsys.readouterr().out
    assert "unsloth" not in report["versions"]


def test_too_few_rows_are_refused(report_of):
    with pytest.raises(ValueError, match="must hold 8 usable rows"):
        report_of([chat_row(seed) for seed in range(5)])


def test_runs_from_different_starts_are_not_compared(bench):
    run = {"side": "ours", "pairs_hash": "a", "num_tokens": [1], "adapter_hash": "b"}
    bench.check_same([run, run | {"side": "trl"}, run | {"side": "trl_as_is", "adapter_hash": "c"}])
    with pytest.raises(RuntimeError, match="`adapter_hash` must be the same"):
        bench.check_same([run, run | {"side": "trl", "adapter_hash": "c"}])


def test_a_run_that_fails_is_said_and_the_others_count(bench, report_of, monkeypatch, capsys):
    def failing(side, work):
        return {"error": "exit status 1: out of memory"} if side == "trl" else bench.run_one(side, work)

    monkeypatch.setattr(bench, "run_in_process", failing)
    with pytest.raises(AssertionError):  # main returns 1
        report_of(groups(3))
    assert "failed: trl" in capsys.readouterr().out


def test_the_profile_accounts_for_every_second_of_a_step(base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    profile = importlib.import_module("profile_step")
    data, output = tmp_path / "rows.jsonl", tmp_path / "profile.json"
    data.write_text("".join(json.dumps(chat_row(seed)) + "\n" for seed in range(9)))
    words = ["--data", str(data), "--model", base_folder, "--dtype", "float32", "--batch_size", "3", "--steps", "2"]
    assert profile.main([*words, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    whole = sum(found["seconds"].values()) + found["not_in_operators"]
    assert whole == pytest.approx(found["profiled_seconds_per_step"])
    assert 0 < found["not_in_operators"] < whole
    assert 0 < found["share_of_peak_in_step"] < found["share_of_peak_in_products"]
    assert len(found["unique_tokens"]) == 2
    printed = capsys.readouterr().out
    for part in {*profile.PARTS, "elementwise"} - {"attention"}:  # which is products and softmax on a CPU
        assert found["seconds"][part] > 0
        assert f"| {part} |" in printed


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("bitsandbytes::dequantize_4bit", "dequantisation"),
        ("aten::addmm", "matrix products"),
        ("aten::copy_", "casts and copies"),
        ("aten::argmax", "exponentials and reductions"),
        ("aten::mul", "elementwise"),
    ],
)
def test_operators_are_told_apart(operator, part, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    assert importlib.import_module("profile_step").part_of(operator) == part
