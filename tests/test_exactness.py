"""The same step however it is cut: micro-batches, accumulation, token budget, processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_dpo.forward import score_batch
from qlora_dpo.step import Step

from one_step import RANKED, one_step

COLUMNS = {
    "weights": [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.5],
    "label_probs": [0.9, 0.6, 1.0, 0.8, 0.7, 0.95, 0.5, 1.0],
}
OBJECTIVES = {
    "sigmoid": {},
    "weights_and_label_probs": {"columns": COLUMNS},
    "ld_alpha": {"ld_alpha": 0.3, "loss_type": "ipo"},
    "use_weighting": {"use_weighting": True},
    "plackett_luce": {"loss_type": "plackett_luce"},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired_ld": {"loss_type": "aot_unpaired", "ld_alpha": 0.5},
    "sft_mix": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "bco_running_mean": {"loss_type": "bco_pair", "bco_running_mean": True},
}
SMALLER_THAN_A_GROUP = 12
"""Positions: every tree of `RANKED` has 13 to 32, a prompt with one completion 9 to 13."""
WHOLE = {}


def whole(objective, groups=8, steps=1):
    """All groups in one forward and backward, two steps where a state is carried."""
    key = (objective, groups, steps)
    if key not in WHOLE:
        WHOLE[key] = one_step(RANKED[:groups], steps=steps, per_device_train_batch_size=groups, **of(objective, groups))
    return WHOLE[key]


def of(objective, groups=8):
    options = dict(OBJECTIVES[objective])
    if "columns" in options:
        options["columns"] = {name: values[:groups] for name, values in options["columns"].items()}
    return options


def assert_same(found, expected):
    """The model is in fp64; a cache of the reference and what processes tell each other is in fp32."""
    (gradients, log), (other_gradients, other_log) = found, expected
    assert len(gradients) == len(other_gradients)
    for mine, other in zip(gradients, other_gradients, strict=True):
        assert (mine - other).norm() < 2e-7 * other.norm()
        assert other.norm() > 1e-3
    for line, other in zip(log, other_log, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert line[key] == pytest.approx(other[key], rel=1e-5), key


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", [(1, 8), (3, 3)], ids=str)
def test_accumulation_changes_neither_loss_nor_gradient(objective, split):
    micro, accumulation = split
    found = one_step(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, **of(objective))
    assert_same(found, whole(objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("budget", [60, SMALLER_THAN_A_GROUP])
def test_a_token_budget_changes_neither_loss_nor_gradient(objective, budget, recwarn):
    """A budget of a few groups, and one that cuts almost every group between its completions."""
    found = one_step(per_device_train_batch_size=8, max_tokens_per_forward=budget, **of(objective))
    assert_same(found, whole(objective))
    alone = [w for w in recwarn if "computed alone" in str(w.message)]
    assert bool(alone) == (budget == SMALLER_THAN_A_GROUP)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_token_budget_holds_in_every_layout(layout):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_forward": 90}
    assert_same(one_step(batch_layout=layout, **options), whole("sigmoid"))


def test_dropout_falls_alike_in_both_stages(monkeypatch):
    """With dropout on, each part's second forward gives the log-probabilities its slopes were computed from."""
    seen = {"first": [], "second": []}
    first, second = Step._without_gradient, Step.second_stage

    def note_first(self, model, batch):
        found = first(self, model, batch)
        seen["first"].append(found[1]["token_logps"])
        return found

    def note_second(self, model, part):
        monkeypatch.setattr("qlora_dpo.step.score_batch", note_scores)
        loss = second(self, model, part)
        monkeypatch.setattr("qlora_dpo.step.score_batch", score_batch)
        return loss

    def note_scores(*args):
        found = score_batch(*args)
        seen["second"].append(found["token_logps"].detach())
        return found

    monkeypatch.setattr(Step, "_without_gradient", note_first)
    monkeypatch.setattr(Step, "second_stage", note_second)
    one_step(
        RANKED[:3],
        max_tokens_per_forward=SMALLER_THAN_A_GROUP,
        per_device_train_batch_size=3,
        disable_dropout=False,
        lora_dropout=0.5,
    )
    assert len(seen["second"]) > 3
    assert torch.equal(torch.cat(seen["first"]), torch.cat(seen["second"]))


def test_a_running_mean_carries_over_steps_alike():
    options = {"steps": 2, "train_sampling_strategy": "sequential", **of("bco_running_mean")}
    parts = one_step(per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert_same(parts, one_step(per_device_train_batch_size=4, **options))


def test_two_processes_change_neither_loss_nor_gradient(tmp_path):
    """World size 2 by torchrun on gloo: 2 x 4 groups, 2 x 2 in two micro-batches, and 7 groups, of which none twice.

    The eighth place is filled with a group that has no pairs; budgets make the processes' numbers of forwards differ.
    """
    cases, expected = [{"per_device_train_batch_size": 4, **of("sigmoid")}], [whole("sigmoid")]
    for objective in OBJECTIVES:
        cases.append({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **of(objective)})
        cases.append({"per_device_train_batch_size": 4, "groups": 7, **of(objective, 7)})
        cases.append({"per_device_train_batch_size": 4, "max_tokens_per_forward": 60, **of(objective)})
        expected += [whole(objective), whole(objective, 7), whole(objective)]
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "reference": "initial", "steps": 3}
    cached = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache.sqlite")}
    cases += [{"per_device_train_batch_size": 4, **moving}, {"per_device_train_batch_size": 4, **cached}]
    expected += [one_step(per_device_train_batch_size=8, **moving), whole("sigmoid")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29683",
         str(here / "one_step.py"), str(tmp_path / "cases.json"), str(tmp_path / "out.pt")],
        capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {case["world"] for case in found} == {2}
    for one, other in zip(found, expected, strict=True):
        assert_same((one["gradients"], one["log"]), other)
