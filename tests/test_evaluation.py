"""The metrics of a model do not depend on how they were computed, and are what NumPy says of the pairs."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import evaluate
import numpy as np
import pytest
from one_evaluation import ROWS, one_evaluation
from report_oracle import at, columns_of, oracle

import qlora_dpo.evaluate_metrics as modules

TIMES = ("runtime", "per_second", "preparation_time")


@cache
def once(rows):
    """Metrics, report and the lines of `pairs.jsonl`, one group at a time."""
    with TemporaryDirectory() as folder:
        metrics, report = one_evaluation(folder, rows)
        return metrics, report, columns_of(Path(folder, "pairs.jsonl"))


def assert_same(found, expected, rel=2e-6):
    """Numbers alike to rounding in fp32, all else equal; recursively."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert sorted(found) == sorted(expected)
        for key in expected:
            if not key.endswith(TIMES):
                assert_same(found[key], expected[key], rel)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, rel)
    elif isinstance(expected, (int, float)):
        assert found == pytest.approx(expected, rel=rel, abs=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("rows", ["pairs", "ranked"])
def test_reports_are_those_of_a_numpy_oracle_on_the_pairs_own_file(rows, tmp_path):
    metrics, report = one_evaluation(str(tmp_path), rows)
    probs = None
    if rows == "pairs":
        written = columns_of(tmp_path / "pairs.jsonl")
        probs = np.array([ROWS[rows][row]["label_probs"] for row in written["row"]])
    expected = oracle(tmp_path / "pairs.jsonl", 0.1, probs)
    assert ("accuracy.low" in expected) == (rows == "pairs")
    for path, value in expected.items():
        assert at(report, path) == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-9)), path
    keys = {"rewards/accuracies": "accuracy.value", "rewards/margins": "margin.mean", "rewards/ties": "ties"}
    keys |= {f"rewards/{side}": f"rewards.{side}" for side in ("chosen", "rejected")}
    keys |= {"expected_calibration_error": "calibration.ece", "brier_score": "calibration.brier"}
    keys |= {f"kl/{side}": f"kl_per_token.{side}" for side in ("chosen", "rejected")}
    for key, path in keys.items():
        assert metrics[f"eval_{key}"] == pytest.approx(expected[path], rel=1e-5, abs=1e-6)


def test_the_modules_say_the_same_of_the_same_pairs():
    _, report, pairs = once("pairs")
    paths = [str(Path(modules.__path__[0], name)) for name in ("preference_accuracy", "implicit_reward_margin")]
    rewards = {f"{side}_rewards": pairs[f"reward_{side}"].tolist() for side in ("chosen", "rejected")}
    found = evaluate.combine(paths).compute(**rewards)
    assert found["preference_accuracy"] == pytest.approx(report["accuracy"]["value"])
    assert found["implicit_reward_margin"] == pytest.approx(report["margin"]["mean"])
    probs = [ROWS["pairs"][row]["label_probs"] for row in pairs["row"]]
    calibration = evaluate.load(str(Path(modules.__path__[0], "preference_calibration")))
    found = calibration.compute(**rewards, label_probs=probs)
    assert found["expected_calibration_error"] == pytest.approx(report["calibration"]["ece"])
    assert found["brier_score"] == pytest.approx(report["calibration"]["brier"])


@pytest.mark.parametrize("rows", ["pairs", "ranked"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"batch_size": 4},
        {"batch_size": 7},
        {"batch_size": 3, "shuffled": 1},
        {"batch_size": 7, "batch_layout": "padded"},
        {"batch_size": 4, "batch_layout": "packed", "max_tokens_per_forward": 40},
        {"batch_size": 4, "shuffled": 2, "logps_chunk_size": 5},
    ],
    ids=str,
)
def test_metrics_are_those_of_one_group_at_a_time(rows, options, tmp_path):
    metrics, report, _ = once(rows)
    found = one_evaluation(str(tmp_path), rows, **options)
    assert_same(found[1], report)
    assert_same(found[0], metrics)


def test_metrics_of_two_processes_are_those_of_one(tmp_path):
    cases = [
        {"folder": str(tmp_path / f"{rows}-{size}"), "rows": rows, "batch_size": size, "shuffled": shuffled}
        for rows in ROWS
        for size, shuffled in ((1, None), (2, None), (4, 3), (7, None))
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29684",
         str(here / "one_evaluation.py"), str(tmp_path / "cases.json"), str(tmp_path / "out.json")],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in zip(cases, json.loads((tmp_path / "out.json").read_text()), strict=True):
        metrics, report, pairs = once(case["rows"])
        assert found["world"] == 2
        assert_same(found["report"], report)
        assert_same(found["metrics"], metrics)
        written = columns_of(Path(case["folder"], "pairs.jsonl"))
        if case["shuffled"] is None:
            order = [np.lexsort((lines["pair"], lines["row"])) for lines in (written, pairs)]
            for name in ("row", "pair", "reward_chosen", "reward_rejected", "logps_chosen", "kl_rejected"):
                np.testing.assert_allclose(written[name][order[0]], pairs[name][order[1]], rtol=2e-5, atol=1e-6)


def test_a_difference_would_be_seen():
    metrics, report, _ = once("pairs")
    with pytest.raises(AssertionError):
        assert_same(report | {"auc": report["auc"] + 1e-4}, report)
    with pytest.raises(AssertionError):
        assert_same({**metrics, "eval_rewards/ties": 0.1}, metrics)
