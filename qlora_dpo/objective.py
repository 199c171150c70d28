"""What an optimizer step minimises: losses by name with their weights, and the modifiers around them.

A modifier changes what a loss sees (`prepared`: length desensitisation, f-divergences, weights of pairs), the losses
are then pure functions of `Scores`. What has no meaning together is refused here, before anything is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_dpo.logps import sum_by_completion
from qlora_dpo.losses import LOSSES, check_range, loss_parameters, pairs_per_group
from qlora_dpo.scores import Scores

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

ON_DIFFERENCES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "odpo")
"""Losses of D alone, where f'(pi / ref) can stand in for the log-ratio."""
TWO_SIDED = ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm", "simpo")
"""Losses whose value for the flipped pair is that of the other label, so that a label may have a probability."""
AGAINST_REFERENCE = ("nca_pair", "bco_pair", "sppo_hard", "aot_unpaired", "apo_zero", "apo_down", "dpop")
"""Losses that look at one log-ratio by itself, which means nothing without a reference."""
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
"""Losses that never look at the reference."""
POOLED = ("aot", "aot_unpaired", "sft")
"""Losses whose value for a pair depends on the other pairs of the optimizer step."""
NOT_OF_PAIRS = ("aot", "aot_unpaired", "sft", "plackett_luce")
"""Losses whose items are no pairs: quantiles, tokens, groups."""

_EXPONENT = 40.0
"""Largest exponent of an f-divergence: the square of exp(40), which `ipo` takes, is finite in fp32."""


def divergence_scores(logratios: Tensor, kind: str, alpha: float) -> Tensor:
    """f'(pi / ref) of each completion, up to a constant: what takes the place of the log-ratio in f-DPO.

    reverse_kl: h; forward_kl: 1 - exp(-h); js_divergence: log 2 + log s(h); alpha_divergence:
    (exp((alpha - 1) h) - 1) / (alpha - 1), with h as its limit at alpha = 1. Exponents are held at 40.

    Hand check: h = 0 gives 0 for all four; forward_kl of h = -log 3 is 1 - 3 = -2.

    Args:
        logratios: `(B,)` h, in nats.
        kind: One of `DIVERGENCES`.
        alpha: Coefficient of the alpha-divergence.

    Returns:
        `(B,)`.

    Source: Wang et al. 2023, arXiv:2309.16240.
    """
    if kind == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * logratios).clamp(max=_EXPONENT)) / (alpha - 1)
    return logratios


def desensitized(scores: Scores, ld_alpha: float) -> Scores:
    """LD-DPO: log-probabilities of each pair's sides, tokens beyond the shorter side counted `ld_alpha` times.

    The cut is a property of the pair, so a completion in three pairs may have three values: the result has 2T
    completions, side w of every pair and then side l, policy and reference alike.

    Hand check: token log-probs -1, -2, -4 against a side of one token give -1 - 6 ld_alpha.

    Source: Liu et al. 2024, arXiv:2409.06411.
    """
    assert scores.pi_token_logps is not None
    if scores.ref_token_logps is None:
        raise ValueError(
            f"`ld_alpha` must be None with given `ref_logps`, got {ld_alpha}: it needs a value for each token. "
            "Drop one."
        )
    lengths = scores.lengths.tolist()
    sides = [*scores.yw_idxs.tolist(), *scores.yl_idxs.tolist()]
    others = [*scores.yl_idxs.tolist(), *scores.yw_idxs.tolist()]

    def cut(token_logps: Tensor) -> Tensor:
        if not sides:
            return token_logps[:0]
        runs = token_logps.split(lengths)
        shared = [runs[a][: lengths[b]] for a, b in zip(sides, others, strict=True)]
        heads = sum_by_completion(torch.cat(shared), [len(run) for run in shared])
        wholes = sum_by_completion(token_logps, lengths)[torch.tensor(sides, device=token_logps.device)]
        return heads + ld_alpha * (wholes - heads)

    pairs = torch.arange(len(scores.yw_idxs), device=scores.yw_idxs.device)
    both = torch.cat((scores.yw_idxs, scores.yl_idxs))
    return replace(
        scores,
        pi_logps=cut(scores.pi_token_logps),
        ref_logps=cut(scores.ref_token_logps),
        likelihood_logps=scores.log_likelihoods[both],
        yw_idxs=pairs,
        yl_idxs=pairs + len(pairs),
        lengths=scores.lengths[both],
        group=scores.group[both],
        pi_token_logps=None,
        ref_token_logps=None,
        pi_log_sum_sq_probs=None,
    )


def on_policy_weights(scores: Scores) -> Tensor:
    """WPO: `(T,)` exp of the mean over tokens of log p - log sum_v p_v^2, the product of both sides, no gradient.

    Hand check: a token of p = 1/2 where the vocabulary has two of them: 1/2 / (1/4 + 1/4) = 1.

    Source: Zhou et al. 2024, arXiv:2406.11827, Eq. 2, aligned by the distribution's own mean.
    """
    assert scores.pi_token_logps is not None
    assert scores.pi_log_sum_sq_probs is not None
    aligned = scores.pi_token_logps.detach() - scores.pi_log_sum_sq_probs.detach()
    means = sum_by_completion(aligned, scores.lengths.tolist()) / scores.lengths
    w, l = scores.sides(means)
    return torch.exp(w + l)


def flipped(scores: Scores) -> Scores:
    """The same pairs with chosen and rejected exchanged."""
    return replace(scores, yw_idxs=scores.yl_idxs, yl_idxs=scores.yw_idxs)


@dataclass(frozen=True)
class Objective:
    """What a step minimises: the mean over pairs of a weighted sum of losses.

    Attributes:
        losses: Names in `LOSSES`.
        weights: Factor of each loss (MPO, arXiv:2411.10442).
        hyperparameters: Values by name, for all losses.
        ld_alpha: Factor of the tokens beyond the shorter side of a pair, in [0, 1]; None for none of it.
        f_divergence_type: One of `DIVERGENCES`.
        f_alpha_divergence_coef: Coefficient of the alpha-divergence.
        use_weighting: Whether pairs are weighted by how likely the policy is to write them (WPO).
        bco_running_mean: Whether the delta of `bco_pair` is a running mean of rewards.
    """

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    bco_running_mean: bool = False

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the optimizer step."""
        return any(name in POOLED for name in self.losses) or self.bco_running_mean

    @property
    def counts_groups(self) -> bool:
        """Whether the mean is over groups instead of pairs."""
        return "plackett_luce" in self.losses

    @property
    def ignores_reference(self) -> bool:
        """Whether no loss looks at the reference."""
        return all(name in WITHOUT_REFERENCE for name in self.losses)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics per token that it needs beside the log-probabilities."""
        return ("log_sum_sq_probs",) if self.use_weighting else ()

    def prepared(self, scores: Scores) -> Scores:
        """The scores as the losses see them: modifiers applied, weights of pairs multiplied into one."""
        weights = scores.weights
        if self.use_weighting:
            on_policy = on_policy_weights(scores)
            weights = on_policy if weights is None else weights * on_policy
        if self.ld_alpha is not None:
            scores = desensitized(scores, self.ld_alpha)
        if self.f_divergence_type != "reverse_kl":
            found = divergence_scores(scores.logratios, self.f_divergence_type, self.f_alpha_divergence_coef)
            scores = replace(
                scores,
                pi_logps=found,
                ref_logps=torch.zeros_like(found),
                likelihood_logps=scores.log_likelihoods,
            )
        return replace(scores, weights=weights)

    def of(self, prepared: Scores, bco_delta: float = 0.0) -> Tensor:
        """`(T,)` losses of prepared scores, weighted."""
        values = {**self.hyperparameters, "bco_delta": bco_delta}
        total = torch.zeros_like(prepared.yw_idxs, dtype=prepared.pi_logps.dtype)
        for name, weight in zip(self.losses, self.weights, strict=True):
            chosen = {key: values[key] for key in loss_parameters(name) if key in values}
            loss = LOSSES[name](prepared, **chosen)
            if prepared.label_probs is not None:
                p = prepared.label_probs
                loss = p * loss + (1 - p) * LOSSES[name](flipped(prepared), **chosen)
            total = total + weight * loss
        return total if prepared.weights is None else prepared.weights * total

    def __call__(self, scores: Scores, bco_delta: float = 0.0) -> Tensor:
        """`(T,)` losses, whose sum divided by the number of `items` is minimised."""
        return self.of(self.prepared(scores), bco_delta)

    def items(self, scores: Scores) -> Tensor:
        """`(T,)` how much of an item of the mean each pair is: 1, or its share of its group's loss."""
        if not self.counts_groups:
            return torch.ones_like(scores.pi_logps[scores.yw_idxs])
        return 1 / pairs_per_group(scores)[scores.group[scores.yw_idxs]].to(scores.pi_logps)


class RunningMean:
    """The mean of all values so far."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        """Take some values in."""
        self.total, self.count = self.total + values.double().sum().item(), self.count + values.numel()

    @property
    def mean(self) -> float:
        """Their mean; 0 before the first."""
        return self.total / self.count if self.count else 0.0


def make_objective(
    loss_type: Sequence[str],
    loss_weights: Sequence[float] | None,
    hyperparameters: Mapping[str, Any],
    **modifiers: Any,
) -> Objective:
    """The objective that the options ask for.

    Args:
        loss_type: Names in `LOSSES`.
        loss_weights: Their factors; None for 1 each.
        hyperparameters: Values by name; those that no loss takes must be left at their defaults.
        **modifiers: The other attributes of `Objective`.

    Raises:
        ValueError: For values out of range, and for combinations that have no meaning.
    """
    names = tuple(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise TypeError(f"`loss_weights` must be numbers, got {list(weights)}. Give one for each loss, or None.")
    for name in names:
        if name not in LOSSES:
            raise ValueError(
                f"`loss_type` must be one of {sorted(LOSSES)}, or a list of them, got {name!r}. Use 'sigmoid'."
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`loss_type` must name each loss once, got {list(names)}. Use `loss_weights`.")
    if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"`loss_weights` must be one number for each of {list(names)}, got {list(weights)}. Add or remove some."
        )
    if "bco_delta" in hyperparameters:
        raise ValueError(
            f"`bco_delta` must be left out, got {hyperparameters['bco_delta']}: it is 0, or a mean of rewards. Set "
            "`bco_running_mean` for that."
        )
    for name, value in hyperparameters.items():
        check_range(name, value)
    objective = Objective(names, tuple(map(float, weights)), hyperparameters, **modifiers)
    _check_unused(objective)
    _check_modifiers(objective)
    return objective


def _check_unused(objective: Objective) -> None:
    """Refuse a hyperparameter that is set and that no loss takes."""
    defaults = {key: value for name in LOSSES for key, value in loss_parameters(name).items() if type(value) is float}
    taken = {key for name in objective.losses for key in loss_parameters(name)}
    for name, value in objective.hyperparameters.items():
        if name in defaults and value != defaults[name] and name not in taken:
            takers = [loss for loss in LOSSES if name in loss_parameters(loss)]
            raise ValueError(
                f"`{name}` must be {defaults[name]:g} for loss_type={list(objective.losses)}, which does not use it, "
                f"got {value}. Losses that do: {takers}."
            )
    if "exo_pair" in objective.losses and not objective.hyperparameters.get("label_smoothing"):
        raise ValueError("`label_smoothing` must be above 0 for loss_type='exo_pair', got 0. 0.001 is usual.")


def _meaningless(objective: Objective, option: str, names: Sequence[str], reason: str) -> None:
    """Refuse an option beside losses it means nothing for."""
    found = [name for name in objective.losses if name in names]
    if found:
        raise ValueError(f"{option} must not be used with loss_type='{found[0]}', got both: {reason}. Drop one.")


def _check_modifiers(objective: Objective) -> None:
    """Refuse modifiers that are out of range or mean nothing for a loss."""
    if objective.f_divergence_type not in DIVERGENCES:
        raise ValueError(
            f"`f_divergence_type` must be one of {list(DIVERGENCES)}, got {objective.f_divergence_type!r}. Use "
            "'reverse_kl'."
        )
    if objective.f_divergence_type != "reverse_kl":
        others = set(LOSSES) - set(ON_DIFFERENCES) - {"sft"}
        option = f"f_divergence_type='{objective.f_divergence_type}'"
        _meaningless(objective, option, sorted(others), "the loss is not built on the difference of log-ratios alone")
    if objective.f_alpha_divergence_coef != 0.5 and objective.f_divergence_type != "alpha_divergence":
        raise ValueError(
            f"`f_alpha_divergence_coef` must be 0.5 for f_divergence_type='{objective.f_divergence_type}', which does "
            f"not use it, got {objective.f_alpha_divergence_coef}. Use f_divergence_type='alpha_divergence'."
        )
    if not math.isfinite(objective.f_alpha_divergence_coef):
        raise ValueError(
            f"`f_alpha_divergence_coef` must be finite, got {objective.f_alpha_divergence_coef}. 1 is 'reverse_kl'."
        )
    if objective.ld_alpha is not None:
        if not 0 <= objective.ld_alpha <= 1:
            raise ValueError(f"`ld_alpha` must be in [0, 1], or None, got {objective.ld_alpha}. 1 is plain DPO.")
        _meaningless(objective, "`ld_alpha`", ("plackett_luce",), "it cuts at the shorter side of a pair")
        _meaningless(objective, "`ld_alpha`", ("orpo",), "odds are of whole completions")
    if objective.use_weighting:
        _meaningless(objective, "`use_weighting`", NOT_OF_PAIRS, "WPO weighs pairs, and its items are no pairs")
    if objective.bco_running_mean and "bco_pair" not in objective.losses:
        raise ValueError("`bco_running_mean` must be False without loss_type='bco_pair', got True. Set it to False.")
    if objective.counts_groups and len(objective.losses) > 1:
        raise ValueError(
            f"loss_type='plackett_luce' must be alone, got {list(objective.losses)}: its mean is over groups, that of "
            "the others over pairs. Drop one."
        )


def options_in_use(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The options among those of a loss that its value depends on, and `beta`, the factor of all rewards.

    >>> options_in_use({"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "ld_alpha": None})
    {'beta': 2.0, 'simpo_gamma': 0.5}
    """
    names = [name for name in loss.get("loss_type") or ["sigmoid"] if name in LOSSES]
    taken = {"beta"}.union(*map(loss_parameters, names))
    known = {key for name in LOSSES for key in loss_parameters(name)}
    off = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, "bco_running_mean": False}
    off |= {"router_aux_loss_coef": None}
    if loss.get("f_divergence_type") != "alpha_divergence":
        off["f_alpha_divergence_coef"] = loss.get("f_alpha_divergence_coef")
    return {
        name: value
        for name, value in loss.items()
        if name not in ("loss_type", "loss_weights")
        and (name in taken or name not in known)
        and not (name in off and value == off[name])
    }


def check_reference(objective: Objective, reference: str) -> None:
    """Refuse to do without a reference where a loss means nothing without one.

    Raises:
        ValueError: If it does.
    """
    if reference == "none":
        _meaningless(objective, "reference='none'", AGAINST_REFERENCE, "it looks at a log-ratio by itself")
        if objective.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"`f_divergence_type` must be 'reverse_kl' with reference='none', got "
                f"'{objective.f_divergence_type}': it is a divergence from the reference. Drop one."
            )


def check_mergeable(objective: Objective) -> None:
    """Refuse to put rows with one prompt together where a row is more to the loss than its pairs.

    Raises:
        ValueError: If it is.
    """
    _meaningless(objective, "`merge_prompts`", ("plackett_luce",), "its rankings are the rows")


def check_columns(objective: Objective, columns: Sequence[str], label_smoothing: float = 0.0) -> None:
    """Refuse columns of a data set that mean nothing for a loss, and the lack of those a loss needs.

    Raises:
        ValueError: If there are any.
    """
    if "weights" in columns:
        _meaningless(objective, "The column `weights`", ("aot", "aot_unpaired"), "its items are quantiles, not pairs")
    if "label_probs" in columns:
        others = sorted(set(LOSSES) - set(TWO_SIDED))
        _meaningless(objective, "The column `label_probs`", others, "the loss of the flipped pair is not defined")
        if label_smoothing:
            raise ValueError(
                f"`label_smoothing` must be 0 with a column `label_probs`, which takes its place, got "
                f"{label_smoothing}. Drop one."
            )
    if "offsets" in columns and "odpo" not in objective.losses:
        raise ValueError(
            f"A column `offsets` must go with loss_type='odpo', which uses it, got {list(objective.losses)}. Remove "
            "the column, or use that loss."
        )
    if "ref_logps" in columns and objective.ignores_reference:
        raise ValueError(
            f"A column `ref_logps` must go with a loss that has a reference, got {list(objective.losses)}. Remove the "
            "column."
        )
    if "ref_logps" in columns and objective.ld_alpha is not None:
        raise ValueError(
            f"`ld_alpha` must be None with a column `ref_logps`, got {objective.ld_alpha}: it needs a value for each "
            "token. Drop one."
        )
    if "odpo" in objective.losses and "offsets" not in columns:
        raise ValueError("loss_type='odpo' must have an offset for each pair, got none. Add an `offsets` column.")
