"""Pair tables, pooled keys, and the modules that `evaluate.load` takes."""

import doctest
import importlib

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.measures import accuracy
from qlora_dpo.metrics import (
    COLUMNS,
    EVALUATE_MODULES,
    HIGHER_IS_BETTER,
    RunningSums,
    outcomes,
    pair_table,
    preference_metrics,
    summarize,
)
from qlora_dpo.scores import Scores

from reference_impl import pair_metrics
from test_trainer import policy_of
from tiny_chat import CHAT_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tie_counts_one_half_in_tensors_arrays_and_modules(dtype):
    margins = torch.tensor([2.0, 0.0, -1e-30, -0.0, 1e-30, torch.nan], dtype=dtype)
    assert outcomes(margins).tolist() == outcomes(margins.float().numpy()).tolist() == [1, 0.5, 0, 0.5, 1, 0]
    known = margins[:5].tolist()
    assert preference_metrics(known, [0.0] * 5)["preference_accuracy"] == accuracy(known) == 0.6


def batch_of(seed, completions=6, pairs=4):
    """Random scores of two prompts, with a tie between the first two completions."""
    generator = torch.Generator().manual_seed(seed)
    pi, ref = -10 * torch.rand(2, completions, dtype=torch.float64, generator=generator)
    pi[1], ref[1] = pi[0], ref[0]
    w = torch.tensor([0, *torch.randint(0, 3, (pairs - 1,), generator=generator).tolist()])
    l = torch.tensor([1, *torch.randint(3, completions, (pairs - 1,), generator=generator).tolist()])
    lengths = torch.randint(1, 9, (completions,), generator=generator)
    scores = Scores(pi, ref, w, l, lengths, torch.tensor([0, 0, 0, 1, 1, 1]))
    statistics = {
        k: torch.rand(completions, generator=generator).double() for k in ("entropy", "mean_logits", "is_top1")
    }
    return scores, statistics


def table_of(seed):
    scores, statistics = batch_of(seed)
    return pair_table(scores, *torch.ones(2, len(scores.yw_idxs)), statistics, beta=0.5)


def test_summary_equals_a_numpy_oracle():
    scores, statistics = batch_of(0)
    table = pair_table(scores, torch.arange(4.0), torch.ones(4), statistics, beta=0.5)
    shown = summarize(dict(zip(COLUMNS, table.sum(0).tolist(), strict=True)), 4)
    rewards = 0.5 * (scores.pi_logps - scores.ref_logps).numpy()
    w, l, lengths = scores.yw_idxs.numpy(), scores.yl_idxs.numpy(), scores.lengths.numpy()
    expected = pair_metrics(rewards[w], rewards[l])
    assert shown["rewards/accuracies"] == pytest.approx(expected["accuracy"])
    assert shown["rewards/ties"] == pytest.approx(0.25)
    assert shown["rewards/margins"] == pytest.approx(expected["margin"])
    assert shown["loss"] == pytest.approx(1.5)
    entropy, top1 = statistics["entropy"].numpy(), statistics["is_top1"].numpy()
    tokens = lengths[w].sum() + lengths[l].sum()
    assert shown["entropy"] == pytest.approx((entropy[w].sum() + entropy[l].sum()) / tokens)
    assert shown["mean_token_accuracy"] == pytest.approx(top1[w].sum() / lengths[w].sum())


def test_running_sums_pool_pairs_not_batches():
    """One batch of 4 pairs and one of 1: the mean over 5 pairs, not the mean of two means."""
    sums, first, second = RunningSums(), table_of(1), table_of(2)[:1]
    sums.add(first, 10)
    sums.add(second, 3)
    found, pairs, unique_tokens = sums.take()
    assert (pairs, unique_tokens) == (5, 13)
    assert found["reward_chosen"] == pytest.approx(
        torch.cat((first, second))[:, COLUMNS.index("reward_chosen")].sum().item()
    )
    assert sums.take() is None


def test_modules_load_offline_and_agree_with_numpy():
    chosen, rejected = [1.0, 0.5, 0.2, 3.0], [0.0, 0.5, 0.9, -1.0]
    found = preference_metrics(chosen, rejected)
    expected = pair_metrics(np.array(chosen), np.array(rejected))
    assert found["preference_accuracy"] == pytest.approx(expected["accuracy"])
    assert found["tie_share"] == 0.25
    assert found["implicit_reward_margin"] == pytest.approx(expected["margin"])


@pytest.mark.parametrize("name", ["preference_accuracy", "implicit_reward_margin"])
def test_modules_add_batches(name):
    module = evaluate.load(str(EVALUATE_MODULES / name))
    module.add_batch(chosen_rewards=[1.0, 2.0], rejected_rewards=[0.0, 3.0])
    module.add(chosen_rewards=5.0, rejected_rewards=1.0)
    whole = evaluate.load(str(EVALUATE_MODULES / name)).compute(
        chosen_rewards=[1.0, 2.0, 5.0], rejected_rewards=[0.0, 3.0, 1.0]
    )
    assert module.compute() == whole


@pytest.mark.parametrize("name", ["preference_accuracy", "implicit_reward_margin"])
def test_module_examples_are_true(name, monkeypatch):
    monkeypatch.chdir(EVALUATE_MODULES.parent.parent)
    source = (EVALUATE_MODULES / name / f"{name}.py").read_text()
    example = doctest.DocTestParser().get_doctest(
        source[: source.index('"""', source.index(">>>"))], {"evaluate": evaluate}, name, name, 0
    )
    assert len(example.examples) == 2
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.failures == 0


WITH_EXAMPLES = sorted(path.stem for path in EVALUATE_MODULES.parent.glob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples_are_true(module):
    found = doctest.testmod(importlib.import_module(f"qlora_dpo.{module}"), extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


BETTER_WHEN_LOWER = {
    "loss", "rewards/rejected", "rewards/ties", "logps/rejected", "entropy", "kl/chosen", "kl/rejected", "tie_share",
    "implicit_reward_margin_std", "expected_calibration_error", "brier_score",
}  # fmt: skip


def test_the_direction_of_every_key_is_known():
    assert {key for key, higher in HIGHER_IS_BETTER.items() if not higher} == BETTER_WHEN_LOWER


@pytest.mark.parametrize(
    ("metric", "better"),
    [("eval_rewards/rejected", False), ("eval_logps/rejected", False), ("eval_rewards/margins", True), ("loss", False)],
)
def test_a_direction_is_that_of_the_key(make_args, metric, better):
    args = make_args(metric_for_best_model=metric)
    assert args.greater_is_better is better
    assert make_args(metric_for_best_model=metric, greater_is_better=not better).greater_is_better is not better


@pytest.mark.parametrize(
    ("metric", "named", "message"),
    [
        ("eval_reward/margins", False, "Did you mean rewards/margins"),
        ("eval_loss", True, "such as eval_chats_rewards/accuracies"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_at_the_start(tokenizer, make_args, metric, named, message):
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args(metric_for_best_model=metric)
    with pytest.raises(ValueError, match=message):
        QLoRADPOTrainer(
            policy_of(tokenizer), args=args, train_dataset=rows, eval_dataset={"chats": rows} if named else rows,
            processing_class=tokenizer,
        )  # fmt: skip


def test_every_key_of_an_evaluation_has_a_direction(tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    trainer = QLoRADPOTrainer(policy_of(tokenizer), args=make_args(), eval_dataset=rows, processing_class=tokenizer)
    found = {key.removeprefix("eval_") for key in trainer.evaluate()}
    about_the_run = {
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "num_tokens",
        "model_preparation_time",
        "epoch",
    }
    assert found - about_the_run - {"logits/chosen", "logits/rejected"} == set(HIGHER_IS_BETTER)
