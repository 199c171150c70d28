"""What is logged, spelled in one place: a table of numbers per pair, its column sums, and the keys made from them.

Everything is a sum over pairs until it is shown, so a log line pools all pairs since the last one, and an evaluation
is exact for every batch size, layout, number of processes and last batch. Training adds up columns on the device and
fetches them once, when it logs; evaluation keeps the rows of the table.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.scores import Scores

COLUMNS = (
    "loss",
    "items",
    "aux_loss",
    "reward_chosen",
    "reward_rejected",
    "accuracy",
    "tie",
    "logps_chosen",
    "logps_rejected",
    "logits_chosen",
    "logits_rejected",
    "tokens_chosen",
    "tokens_rejected",
    "entropy",
    "top1_chosen",
    "kl_chosen",
    "kl_rejected",
    "label_prob",
)
"""Columns of the pair table: per pair, or summed over the scored tokens of one or both of its completions."""

PAIR_MEANS = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/accuracies": "accuracy",
    "rewards/ties": "tie",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}
"""Log keys that are a column's mean over pairs."""

HIGHER_IS_BETTER = {
    "loss": False,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "rewards/ties": False,
    "logps/chosen": True,
    "logps/rejected": False,
    "mean_token_accuracy": True,
    "entropy": False,
    "kl/chosen": False,
    "kl/rejected": False,
    "preference_accuracy": True,
    "tie_share": False,
    "implicit_reward_margin": True,
    "implicit_reward_margin_median": True,
    "implicit_reward_margin_std": False,
    "expected_calibration_error": False,
    "brier_score": False,
}
"""Keys of an evaluation that a best checkpoint can be chosen by, and whether higher is better."""

EVALUATE_MODULES = Path(__file__).parent / "evaluate_metrics"
"""Folder of the modules that `evaluate.load` takes."""


_Numbers = TypeVar("_Numbers", Tensor, np.ndarray)


def outcomes(margins: _Numbers) -> _Numbers:
    """How much each pair counts in an accuracy, by its `(T,)` margin: 1 above 0, one half for a tie, 0 below.

    The modules in `EVALUATE_MODULES` say it again: `evaluate` copies them out of the package.

    >>> outcomes(torch.tensor([0.5, 0.0, -1.0])).tolist(), outcomes(np.array([0.5, 0.0, -1.0])).tolist()
    ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0])
    """
    return (margins > 0) + (margins == 0) / 2


def pair_table(
    scores: Scores,
    losses: Tensor,
    items: Tensor,
    statistics: Mapping[str, Tensor],
    beta: float,
    aux_loss: Tensor | None = None,
) -> Tensor:
    """The numbers of every pair, on the device and without gradient.

    Args:
        scores: Log-probabilities and pairs of the batch.
        losses: `(T,)`.
        items: `(T,)` how much of an item of the mean loss each pair is.
        statistics: `(B,)` sums over tokens of `entropy`, `mean_logits`, `is_top1` and perhaps `kl`.
        beta: Factor of the rewards.
        aux_loss: The forward's load-balancing loss, if the model has routers.

    Returns:
        `(T, len(COLUMNS))`, fp64 where the device has it.
    """
    w, l = scores.yw_idxs, scores.yl_idxs
    rewards, lengths = scores.rewards(beta), scores.lengths
    margins = rewards[w] - rewards[l]
    logps, logits, entropy = scores.pi_logps.detach(), statistics["mean_logits"], statistics["entropy"]
    kl = statistics.get("kl", torch.full_like(logps, torch.nan))
    columns = {
        "loss": losses.detach(),
        "items": items,
        "aux_loss": torch.zeros_like(items) if aux_loss is None else aux_loss.detach().expand_as(items),
        "reward_chosen": rewards[w],
        "reward_rejected": rewards[l],
        "accuracy": outcomes(margins),
        "tie": margins == 0,
        "logps_chosen": logps[w],
        "logps_rejected": logps[l],
        "logits_chosen": logits[w],
        "logits_rejected": logits[l],
        "tokens_chosen": lengths[w],
        "tokens_rejected": lengths[l],
        "entropy": entropy[w] + entropy[l],
        "top1_chosen": statistics["is_top1"][w],
        "kl_chosen": kl[w],
        "kl_rejected": kl[l],
        "label_prob": torch.ones_like(items) if scores.label_probs is None else scores.label_probs,
    }
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    return torch.stack([columns[name].to(wide) for name in COLUMNS], dim=1)


def summarize(sums: Mapping[str, float], pairs: int) -> dict[str, float]:
    """Log keys from column sums over `pairs` pairs. Token keys pool the tokens TRL pools.

    `entropy` (nats) is over the tokens of both sides, `mean_token_accuracy` over those of the chosen one, `logits/*`
    over those of their side. `kl/*` (nats per token, in evaluation) is the exact divergence from the reference. Rewards
    are beta (log pi - log pi_ref), unnormalised, whatever the loss.
    """
    shown = {"loss": sums["loss"] / sums["items"]} | {key: sums[column] / pairs for key, column in PAIR_MEANS.items()}
    shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
    shown["logits/chosen"] = sums["logits_chosen"] / sums["tokens_chosen"]
    shown["logits/rejected"] = sums["logits_rejected"] / sums["tokens_rejected"]
    shown["entropy"] = sums["entropy"] / (sums["tokens_chosen"] + sums["tokens_rejected"])
    for side in ("chosen", "rejected"):
        if not math.isnan(sums[f"kl_{side}"]):
            shown[f"kl/{side}"] = sums[f"kl_{side}"] / sums[f"tokens_{side}"]
    if sums["aux_loss"]:
        shown["aux_loss"] = sums["aux_loss"] / pairs
    shown["mean_token_accuracy"] = sums["top1_chosen"] / sums["tokens_chosen"]
    return shown


class RunningSums:
    """Column sums of pair tables, added up on the device and fetched in one transfer."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, table: Tensor, unique_tokens: int) -> None:
        """Add a `(T, len(COLUMNS))` table of a batch that placed `unique_tokens` tokens."""
        counts = [table.new_full((1,), number) for number in (table.shape[0], unique_tokens)]  # no wait for the device
        row = torch.cat((table[:, : len(COLUMNS)].sum(0), *counts))
        self._total = row if self._total is None else self._total.to(row) + row

    def state(self) -> list[float]:
        """The sums over all processes so far, for a checkpoint; empty if there are none."""
        if self._total is None:
            return []
        total = self._total.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total.tolist()

    def load(self, state: Sequence[float]) -> None:
        """Go on from sums of a checkpoint."""
        self._total = torch.tensor(state, dtype=torch.float64) if state else None

    def take(self) -> tuple[dict[str, float], int, int] | None:
        """Column sums, number of pairs and of unique tokens over all processes since the last call; None if none."""
        total, self._total = self._total, None
        if total is None:
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        *columns, pairs, unique_tokens = total.tolist()
        return dict(zip(COLUMNS, columns, strict=True)), int(pairs), int(unique_tokens)


def best_metric_key(metric: str, sets: Sequence[str] = ()) -> str | None:
    """The key in `HIGHER_IS_BETTER` that `metric_for_best_model` names, with or without `eval_` and a set's name.

    Args:
        metric: The option.
        sets: Names of evaluation sets; with any, the metric must name one.

    >>> best_metric_key("eval_rewards/rejected"), best_metric_key("accuracy")
    ('rewards/rejected', None)
    >>> best_metric_key("eval_chats_loss", ["chats"]), best_metric_key("eval_loss", ["chats"])
    ('loss', None)
    """
    metric = metric.removeprefix("eval_")
    for name in sets:
        if metric.startswith(f"{name}_") and metric.removeprefix(f"{name}_") in HIGHER_IS_BETTER:
            return metric.removeprefix(f"{name}_")
    return metric if not sets and metric in HIGHER_IS_BETTER else None


def preference_metrics(chosen: Any, rejected: Any, label_probs: Any = None) -> dict[str, float]:
    """Accuracy, margin and calibration, against `(T,)` labels or 1, of `(T,)` rewards, by our `evaluate` modules."""
    import evaluate  # slow to import, and only evaluation needs it

    options = {"preference_calibration": {} if label_probs is None else {"label_probs": label_probs}}
    found: dict[str, float] = {}
    for name in ("preference_accuracy", "implicit_reward_margin", "preference_calibration"):
        module = evaluate.load(str(EVALUATE_MODULES / name))
        found |= module.compute(chosen_rewards=chosen, rejected_rewards=rejected, **options.get(name, {}))
    return found
