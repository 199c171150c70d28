"""An independent oracle for the preference losses: the papers' formulas, one pair at a time, in float64.

Written from the papers alone and as plainly as they are: probabilities, `exp` and `log1p`, no code shared with the
package. It is meant for values up to about 60 in size; only what overflows inside that range is written stably.

Notation: pi and ref are the summed log-probs of a completion under policy and reference, in nats; h = pi - ref is its
logratio; D = h_w - h_l; len is a number of completion tokens; s is the logistic function; w is chosen, l is rejected.
A hyperparameter that a loss does not have is a TypeError, and only those with a neutral value have a default.
"""

import math

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Shared pieces


def s(x: Tensor) -> Tensor:
    """The logistic function 1 / (1 + exp(-x)) of a 0-dim tensor, expanded by exp(x) where exp(-x) could overflow."""
    return 1 / (1 + torch.exp(-x)) if x >= 0 else torch.exp(x) / (torch.exp(x) + 1)


def neg_log_s(x: Tensor) -> Tensor:
    """-log s(x) = log(1 + exp(-x)) of a 0-dim tensor, as log(1 + exp(x)) - x where exp(-x) could overflow."""
    return torch.log1p(torch.exp(-x)) if x >= 0 else torch.log1p(torch.exp(x)) - x


def logratios(side: dict) -> tuple[Tensor, Tensor]:
    """h_w and h_l, the sums of log pi/ref over each completion, in nats."""
    return side["pi_w"] - side["ref_w"], side["pi_l"] - side["ref_l"]


def logratio_difference(side: dict) -> Tensor:
    """D = h_w - h_l, in nats."""
    h_w, h_l = logratios(side)
    return h_w - h_l


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log s(x) with probability 1 - e, -log s(-x) with probability e."""
    return (1 - label_smoothing) * neg_log_s(x) + label_smoothing * neg_log_s(-x)


# ----------------------------------------------------------------------------------------------------------------------
# Losses of one pair


def sigmoid(side: dict, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, and with smoothing conservative DPO. Source: arXiv:2305.18290 Eq. 7."""
    return smoothed(beta * logratio_difference(side), label_smoothing)


def hinge(side: dict, beta: float) -> Tensor:
    """max(0, 1 - beta D), with slope 0 at the kink. Source: SLiC-HF, arXiv:2305.10425; RSO, arXiv:2309.06657."""
    return torch.relu(1 - beta * logratio_difference(side))


def ipo(side: dict, beta: float) -> Tensor:
    """Squared distance of the per-token logratio difference to 1 / (2 beta). Source: arXiv:2310.12036 Eq. 17."""
    h_w, h_l = logratios(side)
    return (h_w / side["len_w"] - h_l / side["len_l"] - 1 / (2 * beta)) ** 2


def exo_pair(side: dict, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p), q the softmax of beta h over the pair and p = (1 - e, e). Source: EXO, arXiv:2402.00856 Eq. 16."""
    if label_smoothing <= 0:
        raise ValueError(f"`label_smoothing` must be positive for exo_pair, got {label_smoothing}. Try 1e-3.")
    h_w, h_l = logratios(side)
    total = torch.exp(beta * h_w) + torch.exp(beta * h_l)
    q_w, q_l = torch.exp(beta * h_w) / total, torch.exp(beta * h_l) / total
    return q_w * torch.log(q_w / (1 - label_smoothing)) + q_l * torch.log(q_l / label_smoothing)


def nca_pair(side: dict, beta: float) -> Tensor:
    """Noise contrastive alignment with K = 2. Source: arXiv:2402.05369."""
    h_w, h_l = logratios(side)
    return neg_log_s(beta * h_w) + neg_log_s(-beta * h_w) / 2 + neg_log_s(-beta * h_l) / 2


def robust(side: dict, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO made unbiased under labels that are flipped with probability e. Source: rDPO, arXiv:2403.00409."""
    e, x = label_smoothing, beta * logratio_difference(side)
    return ((1 - e) * neg_log_s(x) - e * neg_log_s(-x)) / (1 - 2 * e)


def bco_pair(side: dict, beta: float, bco_delta: float = 0.0) -> Tensor:
    """Binary classifier of rewards against the shift delta. Source: BCO, arXiv:2404.04656."""
    h_w, h_l = logratios(side)
    return neg_log_s(beta * h_w - bco_delta) + neg_log_s(-(beta * h_l - bco_delta))


def sppo_hard(side: dict, beta: float) -> Tensor:
    """Self-play regression to +-1 / (2 beta), the winner's probability set to 1. Source: arXiv:2405.00675 Eq. 4.7."""
    h_w, h_l = logratios(side)
    return (h_w - 1 / (2 * beta)) ** 2 + (h_l + 1 / (2 * beta)) ** 2


def apo_zero(side: dict, beta: float) -> Tensor:
    """Chosen up, rejected down. Source: APO, arXiv:2408.06266 Eq. 7."""
    h_w, h_l = logratios(side)
    return 1 - s(beta * h_w) + s(beta * h_l)


def apo_down(side: dict, beta: float) -> Tensor:
    """Chosen down, rejected further down. Source: APO, arXiv:2408.06266 Eq. 8."""
    h_w, h_l = logratios(side)
    return s(beta * h_w) + 1 - s(beta * (h_w - h_l))


def discopop(side: dict, beta: float, discopop_tau: float) -> Tensor:
    """Logistic and exponential loss, mixed by s(beta D / tau). Source: DiscoPOP, arXiv:2406.08414 Eq. 5."""
    x = beta * logratio_difference(side)
    mix = s(x / discopop_tau)
    return (1 - mix) * neg_log_s(x) + mix * torch.exp(-x)


def sigmoid_norm(side: dict, beta: float) -> Tensor:
    """DPO of per-token logratios. Source: Tulu 3, arXiv:2411.15124."""
    h_w, h_l = logratios(side)
    return neg_log_s(beta * (h_w / side["len_w"] - h_l / side["len_l"]))


def simpo(side: dict, beta: float, simpo_gamma: float) -> Tensor:
    """Per-token log-probs without a reference, with a target margin gamma. Source: arXiv:2405.14734 Eq. 6."""
    return neg_log_s(beta * (side["pi_w"] / side["len_w"] - side["pi_l"] / side["len_l"]) - simpo_gamma)


def orpo(side: dict, beta: float, orpo_lambda: float) -> Tensor:
    """NLL per chosen token plus lambda times -log s(log odds ratio); beta is not used. Source: arXiv:2403.07691."""
    mean_w, mean_l = side["pi_w"] / side["len_w"], side["pi_l"] / side["len_l"]
    log_odds_w = mean_w - torch.log(-torch.expm1(mean_w))  # log p - log(1 - p), p = exp(mean)
    log_odds_l = mean_l - torch.log(-torch.expm1(mean_l))
    return -mean_w + orpo_lambda * neg_log_s(log_odds_w - log_odds_l)


def cpo(side: dict, beta: float, cpo_alpha: float) -> Tensor:
    """DPO without a reference, plus alpha times the NLL per chosen token. Source: arXiv:2401.08417 (there summed)."""
    return neg_log_s(beta * (side["pi_w"] - side["pi_l"])) + cpo_alpha * -side["pi_w"] / side["len_w"]


def dpop(side: dict, beta: float, dpop_lambda: float) -> Tensor:
    """DPO that pays for a chosen completion below the reference, slope 0 at h_w = 0. Source: arXiv:2402.13228."""
    h_w, h_l = logratios(side)
    return neg_log_s(beta * (h_w - h_l - dpop_lambda * torch.relu(-h_w)))


def odpo(side: dict, beta: float) -> Tensor:
    """DPO whose margin must exceed the offset of the row. Source: arXiv:2402.10571."""
    return neg_log_s(beta * logratio_difference(side) - side["offset"])


PAIR_LOSSES = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down),
        *(discopop, sigmoid_norm, simpo, orpo, cpo, dpop, odpo),
    )
}


def pair_loss(name: str, side: dict, *, beta: float, **hyper) -> Tensor:
    """The loss `name` of one pair.

    Args:
        name: A key of `PAIR_LOSSES`.
        side: `pi_w`, `pi_l`, `ref_w`, `ref_l` as 0-dim float64 tensors, nats; `len_w`, `len_l` in tokens; for odpo
            also `offset`.
        beta: Strength of the pull to the reference.
        hyper: The hyperparameters of this loss, and no others.

    Returns:
        0-dim loss with its graph.
    """
    return PAIR_LOSSES[name](side, beta, **hyper)


# ----------------------------------------------------------------------------------------------------------------------
# Losses that couple the pairs of a step


def aot(sides: list[dict], beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Sorted policy differences against sorted reference differences. Source: paired AOT, arXiv:2406.05882."""
    policy = sorted(side["pi_w"] - side["pi_l"] for side in sides)
    reference = sorted(side["ref_w"] - side["ref_l"] for side in sides)
    return torch.stack([smoothed(beta * (p - r), label_smoothing) for p, r in zip(policy, reference, strict=True)])


def aot_unpaired(sides: list[dict], beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Sorted chosen logratios against sorted rejected logratios. Source: unpaired AOT, arXiv:2406.05882."""
    chosen = sorted(logratios(side)[0] for side in sides)
    rejected = sorted(logratios(side)[1] for side in sides)
    return torch.stack([smoothed(beta * (w - l), label_smoothing) for w, l in zip(chosen, rejected, strict=True)])


def sft(sides: list[dict], beta: float) -> Tensor:
    """NLL per chosen token of the whole step, as every item; beta is not used. Source: arXiv:2404.19733."""
    mean = -sum(side["pi_w"] for side in sides) / sum(side["len_w"] for side in sides)
    return torch.stack([mean for _ in sides])


STEP_LOSSES = {loss.__name__: loss for loss in (aot, aot_unpaired, sft)}


def step_losses(name: str, sides: list[dict], *, beta: float, **hyper) -> Tensor:
    """The loss `name` of a step of T pairs.

    Args:
        name: A key of `STEP_LOSSES`.
        sides: T pairs as in `pair_loss`.
        beta: Strength of the pull to the reference.
        hyper: The hyperparameters of this loss, and no others.

    Returns:
        (T,) losses with their graph; of the sorted losses, item k belongs to the k-th smallest values.
    """
    return STEP_LOSSES[name](sides, beta, **hyper)


def plackett_luce(h: Tensor, beats: list[tuple[int, int]], beta: float) -> Tensor:
    """-log of each winner's share of exp(beta h) among itself and all it beats. Source: arXiv:2305.18290 App. A.3.

    Args:
        h: (K,) logratios of one group, nats.
        beats: Pairs (w, l) of completion indices; every one that follows from the ranking must be listed.
        beta: Strength of the pull to the reference.

    Returns:
        0-dim sum over the completions that beat at least one other.
    """
    total = torch.zeros((), dtype=h.dtype)
    for w in sorted({w for w, _ in beats}):
        losers = sorted({l for winner, l in beats if winner == w})
        total = total + torch.log1p(sum(torch.exp(beta * (h[l] - h[w])) for l in losers))
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Modifiers


def divergence_score(kind: str, h: Tensor, coef: float = 0.5) -> Tensor:
    """f'(t) at t = pi/ref = exp(h), any shape. Source: f-DPO, arXiv:2309.16240, constants and `coef` as in TRL.

    The paper's alpha is 1 - `coef`: (1 - t^-alpha) / alpha = (t^(coef - 1) - 1) / (coef - 1).
    """
    if kind == "reverse_kl":  # log t
        return h
    if kind == "forward_kl":  # 1 - 1/t
        return 1 - torch.exp(-h)
    if kind == "js_divergence":  # log(2t / (t + 1)) = log 2 - log(1 + 1/t)
        return math.log(2) - torch.log1p(torch.exp(-h))
    if kind == "alpha_divergence":  # (t^(coef - 1) - 1) / (coef - 1), which tends to log t
        return h if coef == 1 else torch.expm1((coef - 1) * h) / (coef - 1)
    raise ValueError(f"`kind` must be a divergence of this function, got {kind!r}. Use reverse_kl.")


def ld_logps(token_logps_w: Tensor, token_logps_l: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Summed log-probs whose tokens past the shorter length count alpha. Source: LD-DPO, arXiv:2409.06411."""
    shared = min(len(token_logps_w), len(token_logps_l))
    chosen = token_logps_w[:shared].sum() + alpha * token_logps_w[shared:].sum()
    rejected = token_logps_l[:shared].sum() + alpha * token_logps_l[shared:].sum()
    return chosen, rejected


def wpo_weight(token_logps_w: Tensor, log_sum_sq_w: Tensor, token_logps_l: Tensor, log_sum_sq_l: Tensor) -> Tensor:
    """Geometric mean of p(token) / sum_v p(v)^2, chosen times rejected, without gradient. Source: arXiv:2406.11827."""
    with torch.no_grad():
        chosen = torch.exp((token_logps_w - log_sum_sq_w).mean())
        rejected = torch.exp((token_logps_l - log_sum_sq_l).mean())
        return chosen * rejected
