"""Preference losses as pure functions of log-probabilities.

Every loss in `LOSSES` maps `Scores` to `(T,)` losses, one per pair, whose mean is minimised. Notation: a completion has
h = log pi(y|x) - log pi_ref(y|x) and |y| tokens, a pair D = h_w - h_l; s is the logistic function, b `beta`, e
`label_smoothing`. Keyword-only parameters carry the names of the fields of `QLoRADPOConfig` that set them; their ranges
are in `RANGES`, and a value outside raises `ValueError`.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_dpo.scores import Scores

RANGES: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "beta": ("be above 0 and finite", lambda v: 0 < v < math.inf, "0.1 is usual."),
    "label_smoothing": ("be in [0, 0.5)", lambda v: 0 <= v < 0.5, "It is the share of labels that are flipped."),
    "discopop_tau": ("be in (0, 1]", lambda v: 0 < v <= 1, "The paper has 0.05."),
    "simpo_gamma": ("be finite and 0 or more", lambda v: 0 <= v < math.inf, "0.5 is usual."),
    "orpo_lambda": ("be above 0 and finite", lambda v: 0 < v < math.inf, "0.1 is usual."),
    "cpo_alpha": ("be finite and 0 or more", lambda v: 0 <= v < math.inf, "The paper has 1."),
    "dpop_lambda": ("be finite and 0 or more", lambda v: 0 <= v < math.inf, "The paper has 50."),
    "bco_delta": ("be finite", math.isfinite, "It is a mean of rewards."),
}
"""What each hyperparameter must be, the test of it, and advice."""


def check_range(name: str, value: float) -> None:
    """Refuse a hyperparameter outside its range.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside.
    """
    rule, holds, advice = RANGES[name]
    if not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}. {advice}")
    if not holds(value):
        raise ValueError(f"`{name}` must {rule}, got {value}. {advice}")


def _in_range(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, refusing hyperparameters outside their range."""

    @functools.wraps(loss)
    def checked(scores: Scores, **hyperparameters: float) -> Tensor:
        for name, value in hyperparameters.items():
            if name in RANGES:
                check_range(name, value)
        return loss(scores, **hyperparameters)

    return checked


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z)."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _per_token(values: Tensor, scores: Scores) -> Tensor:
    """`(B,)` values divided by the completions' lengths."""
    return values / scores.lengths


@_in_range
def sigmoid_loss(scores: Scores, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1 - e) log s(b D) - e log s(-b D); e = 0 is the paper's loss, e > 0 is conservative DPO (cDPO).

    Hand check: b = 0.1 and D = 0 give log 2 = 0.6931 for every e.

    Args:
        scores: Log-probabilities and pairs.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5).

    Returns:
        `(T,)` losses.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return _smoothed(beta * scores.logratio_differences, label_smoothing)


@_in_range
def hinge_loss(scores: Scores, *, beta: float) -> Tensor:
    """Hinge (SLiC, RSO): max(0, 1 - b D). `beta` > 0 is the reciprocal of the margin at which the loss ends.

    Hand check: b = 0.1 and D = 4 give 1 - 0.4 = 0.6.

    Source: Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * scores.logratio_differences)


@_in_range
def ipo_loss(scores: Scores, *, beta: float) -> Tensor:
    """IPO: (h_w / |y_w| - h_l / |y_l| - 1 / (2 b))^2, log-ratios per token; `beta` > 0 is the paper's tau.

    Eq. 17 of the paper is written with log-ratios of whole sequences. Averages over tokens are what its authors say
    they used, and what TRL computes; sums would let the squared loss grow with length.

    Hand check: b = 0.5, h_w = 4 over 2 tokens and h_l = -3 over 3 tokens give (2 + 1 - 1)^2 = 4.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (scores.differences(_per_token(scores.logratios, scores)) - 1 / (2 * beta)) ** 2


@_in_range
def exo_pair_loss(scores: Scores, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs: KL(q, [1 - e, e]) with q the softmax of b h over the pair; `label_smoothing` e in (0, 0.5).

    The divergence from a certain label (e = 0) is infinite.

    Hand check: D = 0 gives q = [1/2, 1/2], so at e = 0.1: -log 2 - (log 0.9 + log 0.1) / 2 = 0.510826.

    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    if label_smoothing == 0:
        raise ValueError("`label_smoothing` must be above 0 for loss_type='exo_pair', got 0. TRL's users take 0.001.")
    logits = beta * scores.logratio_differences
    epsilon = torch.as_tensor(label_smoothing, dtype=logits.dtype)
    log_qw, log_ql = F.logsigmoid(logits), F.logsigmoid(-logits)
    return log_qw.exp() * (log_qw - torch.log1p(-epsilon)) + log_ql.exp() * (log_ql - torch.log(epsilon))


@_in_range
def nca_pair_loss(scores: Scores, *, beta: float) -> Tensor:
    """NCA for pairs: -log s(b h_w) - 1/2 log s(-b h_w) - 1/2 log s(-b h_l); `beta` > 0.

    Hand check: h_w = h_l = 0 give 2 log 2 = 1.386294.

    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    w, l = scores.sides(beta * scores.logratios)
    return -F.logsigmoid(w) - F.logsigmoid(-w) / 2 - F.logsigmoid(-l) / 2


@_in_range
def robust_loss(scores: Scores, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2 e), unbiased if a share e in [0, 0.5) is flipped.

    Hand check: D = 0 gives (0.9 - 0.1) log 2 / 0.8 = log 2 at e = 0.1.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    logits = beta * scores.logratio_differences
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@_in_range
def bco_pair_loss(scores: Scores, *, beta: float, bco_delta: float = 0.0) -> Tensor:
    """BCO for pairs: -log s(b h_w - d) - log s(-(b h_l - d)); d is `bco_delta`, `beta` > 0.

    In the paper d is a running mean of the rewards (`bco_running_mean`); TRL leaves it at 0.

    Hand check: b = 0.5, h_w = 4, h_l = 2, d = 1 give log(1 + e^-1) + log 2 = 1.006409.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    w, l = scores.sides(beta * scores.logratios)
    return -F.logsigmoid(w - bco_delta) - F.logsigmoid(bco_delta - l)


@_in_range
def sppo_hard_loss(scores: Scores, *, beta: float) -> Tensor:
    """SPPO with certain labels: (h_w - 1 / (2 b))^2 + (h_l + 1 / (2 b))^2; `beta` > 0 is 1 / eta of the paper.

    Hand check: b = 0.5, h_w = 3, h_l = 1 give (3 - 1)^2 + (1 + 1)^2 = 8.

    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 and P = 0.
    """
    w, l = scores.sides(scores.logratios)
    return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2


@_in_range
def aot_loss(scores: Scores, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: the cDPO loss of z = b (sort(log pi_w - log pi_l) - sort(log ref_w - log ref_l)).

    Sorting is over all pairs of the optimizer step; loss k belongs to the k-th quantile, not to pair k. `beta` > 0,
    `label_smoothing` in [0, 0.5).

    Hand check: policy margins 3, 1 and reference margins 0, 2 give sorted differences 1 - 0 and 3 - 2, so at b = 1 two
    losses of log(1 + e^-1) = 0.313262.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    policy = scores.differences(scores.pi_logps).sort().values
    reference = scores.differences(scores.ref_logps).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


@_in_range
def aot_unpaired_loss(scores: Scores, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired: the cDPO loss of z = b (sort(h_w) - sort(h_l)), sorted over all pairs of the optimizer step.

    Loss k belongs to the k-th quantile, not to pair k. `beta` > 0, `label_smoothing` in [0, 0.5).

    Hand check: h_w = 2, 0 and h_l = 1, -1 give sorted differences 0 + 1 and 2 - 1, so at b = 1 two losses of 0.313262.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    w, l = scores.sides(scores.logratios)
    return _smoothed(beta * (w.sort().values - l.sort().values), label_smoothing)


@_in_range
def apo_zero_loss(scores: Scores, *, beta: float) -> Tensor:
    """APO-zero: 1 - s(b h_w) + s(b h_l), for chosen completions better than the model's own; `beta` > 0.

    Hand check: h_w = h_l = 0 give 1.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    w, l = scores.sides(beta * scores.logratios)
    return torch.sigmoid(-w) + torch.sigmoid(l)


@_in_range
def apo_down_loss(scores: Scores, *, beta: float) -> Tensor:
    """APO-down: s(b h_w) + 1 - s(b D), for chosen completions worse than the model's own; `beta` > 0.

    Hand check: h_w = h_l = 0 give 1.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    w, _ = scores.sides(beta * scores.logratios)
    return torch.sigmoid(w) + torch.sigmoid(-beta * scores.logratio_differences)


@_in_range
def discopop_loss(scores: Scores, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: (1 - m)(-log s(b D)) + m exp(-b D) with m = s(b D / tau); `beta` > 0, `discopop_tau` in (0, 1].

    m exp(-b D) is computed as exp(log s(b D / tau) - b D), which stays finite where exp(-b D) overflows.

    Hand check: D = 0 gives m = 1/2, so (log 2 + 1) / 2 = 0.846574.

    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    logits = beta * scores.logratio_differences
    modulation = logits / discopop_tau
    return torch.sigmoid(-modulation) * -F.logsigmoid(logits) + torch.exp(F.logsigmoid(modulation) - logits)


@_in_range
def sigmoid_norm_loss(scores: Scores, *, beta: float) -> Tensor:
    """Length-normalised DPO: -log s(b (h_w / |y_w| - h_l / |y_l|)); `beta` > 0.

    Hand check: b = 1, h_w = 4 over 2 tokens and h_l = 3 over 3 tokens give log(1 + e^-1) = 0.313262.

    Source: Lambert et al. 2024, Tulu 3, arXiv:2411.15124.
    """
    return -F.logsigmoid(beta * scores.differences(_per_token(scores.logratios, scores)))


@_in_range
def sft_loss(scores: Scores) -> Tensor:
    """Likelihood of the chosen: -log pi_w T / (sum of all |y_w|), whose mean pools the tokens of the optimizer step.

    The paper normalises each sequence by its own length; pooling is what TRL does.

    Hand check: log pi_w = -3 over 1 token and -5 over 3 tokens give 1.5 and 2.5, mean (3 + 5) / 4 = 2.

    Source: Pang et al. 2024, arXiv:2404.19733.
    """
    nll, _ = scores.sides(-scores.log_likelihoods)
    tokens, _ = scores.sides(scores.lengths)
    return nll * len(nll) / tokens.sum()


@_in_range
def simpo_loss(scores: Scores, *, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO: -log s(b (log pi_w / |y_w| - log pi_l / |y_l|) - gamma), without a reference; `simpo_gamma` >= 0.

    gamma as in TRL and in the paper's Eq. 6; the authors' code takes gamma / beta. `beta` > 0, usually 2 to 10.

    Hand check: b = 2, log pi_w = -2 over 2 tokens, log pi_l = -6 over 3 tokens, gamma = 1: -log s(1) = 0.313262.

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return -F.logsigmoid(beta * scores.differences(_per_token(scores.pi_logps, scores)) - simpo_gamma)


@_in_range
def orpo_loss(scores: Scores, *, orpo_lambda: float = 0.1) -> Tensor:
    """ORPO: NLL per token of y_w - lambda log s(log odds_w - log odds_l), without a reference; `orpo_lambda` > 0.

    Odds are those of p = exp(log pi / |y|): log p - log(1 - p). p is held a rounding below 1, where odds are infinite.

    Hand check: log pi_w = log(1/2) over 1 token, log pi_l = log(1/3) over 1: odds 1 and 1/2, so log 2 - 0.1 log(2/3)
    = 0.733694 at lambda 0.1.

    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    log_p = _per_token(scores.pi_logps, scores)
    below_one = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    log_odds = below_one - torch.log(-torch.expm1(below_one))
    nll, _ = scores.sides(_per_token(-scores.log_likelihoods, scores))
    return nll - orpo_lambda * F.logsigmoid(scores.differences(log_odds))


@_in_range
def cpo_loss(scores: Scores, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """CPO: -log s(b (log pi_w - log pi_l)) + alpha NLL per token of y_w, without a reference; `cpo_alpha` >= 0.

    The paper sums the NLL over the tokens; per token is what TRL does. `beta` > 0.

    Hand check: log pi_w = -4 over 2 tokens, log pi_l = -4, alpha = 1: log 2 + 2 = 2.693147.

    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    nll, _ = scores.sides(_per_token(-scores.log_likelihoods, scores))
    return -F.logsigmoid(beta * scores.differences(scores.pi_logps)) + cpo_alpha * nll


@_in_range
def dpop_loss(scores: Scores, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-positive: -log s(b (D - lambda max(0, -h_w))), which keeps log pi_w from falling; `dpop_lambda` >= 0.

    Hand check: b = 0.1, h_w = -2, h_l = -12, lambda = 5: 10 - 10 = 0, so log 2. `beta` > 0.

    Source: Pal et al. 2024, Smaug, arXiv:2402.13228.
    """
    w, _ = scores.sides(scores.logratios)
    return -F.logsigmoid(beta * (scores.logratio_differences - dpop_lambda * torch.relu(-w)))


@_in_range
def odpo_loss(scores: Scores, *, beta: float) -> Tensor:
    """DPO with an offset: -log s(b D - offset), the offset of each pair from the data column `offsets`; `beta` > 0.

    Hand check: b = 0.1, D = 20, offset 1: -log s(1) = 0.313262.

    Source: Amini et al. 2024, arXiv:2402.10571.
    """
    if scores.offsets is None:
        raise ValueError("loss_type='odpo' must have an offset for each pair, got none. Add an `offsets` column.")
    return -F.logsigmoid(beta * scores.logratio_differences - scores.offsets)


@_in_range
def plackett_luce_loss(scores: Scores, *, beta: float) -> Tensor:
    """Plackett-Luce over each group: -sum_k log softmax of b h over the k-th best completion and those it beats.

    The pairs say who beats whom: with all pairs of a ranking this is the paper's loss, completions that tie do not
    compete, and with one pair it is DPO. A group is one item: its loss is spread evenly over its pairs, so that the
    sum over pairs divided by the number of groups is the mean. `beta` > 0.

    Hand check: h = 0 for three ranked completions gives log 3 + log 2 = 1.791759, a third of it on each of three pairs.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Appendix A.3.
    """
    rewards = beta * scores.logratios
    completions, groups = len(rewards), int(scores.group.max()) + 1
    competes = torch.zeros(completions, completions, dtype=torch.bool, device=rewards.device)
    competes[scores.yw_idxs, scores.yl_idxs] = True
    beats = competes.any(-1)
    competes |= torch.diag(beats)
    rivals = torch.where(competes, rewards, -torch.inf)[beats]
    terms = rivals.logsumexp(-1) - rewards[beats]
    per_group = torch.zeros(groups, dtype=rewards.dtype, device=rewards.device)
    per_group = per_group.index_add(0, scores.group[beats], terms)
    return (per_group / pairs_per_group(scores))[scores.group[scores.yw_idxs]]


def pairs_per_group(scores: Scores) -> Tensor:
    """`(groups,)` number of pairs of each group, at least 1."""
    return scores.group[scores.yw_idxs].bincount(minlength=int(scores.group.max()) + 1).clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "robust": robust_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "sft": sft_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "cpo": cpo_loss,
    "dpop": dpop_loss,
    "odpo": odpo_loss,
    "plackett_luce": plackett_luce_loss,
}
"""Losses by the name `loss_type` takes."""


def loss_parameters(name: str) -> dict[str, Any]:
    """The hyperparameters of the loss `name` with their defaults (`inspect.Parameter.empty` where it has none)."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The DPO loss as listed in the paper.

    Args:
        pi_logps: `(B,)` policy log-probabilities of B unique completions, in nats.
        ref_logps: `(B,)` reference log-probabilities of the same completions.
        yw_idxs: `(T,)` index in [0, B) of the preferred completion of each of T pairs.
        yl_idxs: `(T,)` index in [0, B) of the dispreferred completion of each pair.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        losses: `(T,)`, -log sigmoid(reward_w - reward_l), differentiable in `pi_logps`.
        rewards: `(B,)`, beta (log pi - log pi_ref), without gradient.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Appendix B.

    >>> losses, rewards = dpo_loss(torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0]),
    ...                            torch.tensor([0]), torch.tensor([1]), beta=0.5)
    >>> rewards.tolist()
    [0.5, -0.5]
    >>> round(losses.item(), 4)  # -log sigmoid(1)
    0.3133
    """
    pi_logratios = pi_logps[yw_idxs] - pi_logps[yl_idxs]
    ref_logratios = ref_logps[yw_idxs] - ref_logps[yl_idxs]
    losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
    rewards = beta * (pi_logps - ref_logps).detach()
    return losses, rewards
