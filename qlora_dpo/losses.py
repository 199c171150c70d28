"""Preference losses as pure functions of log-probabilities.

Shapes: B unique completions, T pairs. A pair is two indices into the B completions, so a completion that appears in
three pairs is scored once and receives the summed gradient of the three.

Every loss in `LOSSES` maps `Scores` to `(T,)` losses. Its keyword-only parameters carry the names of the fields of
`QLoRADPOConfig` that set them, which is how the trainer knows what to pass.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What a loss may ask about a batch.

    Attributes:
        pi_logps: `(B,)` policy log-probability of each completion, summed over its tokens, in nats.
        ref_logps: `(B,)` the same under the reference; zeros without a reference.
        yw_idxs: `(T,)` index of the chosen completion of each pair.
        yl_idxs: `(T,)` index of the rejected completion of each pair.
        lengths: `(B,)` number of scored tokens of each completion.
        group: `(B,)` index of the group (prompt) each completion belongs to.
    """

    pi_logps: Tensor
    ref_logps: Tensor
    yw_idxs: Tensor
    yl_idxs: Tensor
    lengths: Tensor
    group: Tensor

    @property
    def logratios(self) -> Tensor:
        """`(B,)` h = log pi(y|x) - log pi_ref(y|x), in nats."""
        return self.pi_logps - self.ref_logps

    @property
    def logratio_differences(self) -> Tensor:
        """`(T,)` D = h_w - h_l of each pair, in nats."""
        logratios = self.logratios
        return logratios[self.yw_idxs] - logratios[self.yl_idxs]

    def rewards(self, beta: float) -> Tensor:
        """`(B,)` implicit rewards beta * h, without gradient."""
        return beta * self.logratios.detach()


def sigmoid_loss(scores: Scores, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1 - e) log s(beta D) - e log s(-beta D); e = 0 is the paper's loss, e > 0 is conservative DPO (cDPO).

    Hand check: beta = 0.1 and D = 0 give log 2 = 0.6931 for every e.

    Args:
        scores: Log-probabilities and pairs.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: e, the probability that a label is flipped, in [0, 0.5).

    Returns:
        `(T,)` losses.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logits = beta * scores.logratio_differences
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def hinge_loss(scores: Scores, *, beta: float) -> Tensor:
    """Hinge (SLiC, RSO): max(0, 1 - beta D).

    Hand check: beta = 0.1 and D = 4 give 1 - 0.4 = 0.6.

    Args:
        scores: Log-probabilities and pairs.
        beta: Reciprocal of the margin at which the loss ends, > 0.

    Returns:
        `(T,)` losses.

    Source: Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657.
    """
    return torch.relu(1 - beta * scores.logratio_differences)


def ipo_loss(scores: Scores, *, beta: float) -> Tensor:
    """IPO: (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2, log-ratios per token.

    Eq. 17 of the paper is written with log-ratios of whole sequences. Averages over tokens are what its authors say
    they used, and what TRL computes; sums would let the squared loss grow with length.

    Hand check: beta = 0.5, h_w = 4 over 2 tokens and h_l = -3 over 3 tokens give (2 + 1 - 1)^2 = 4.

    Args:
        scores: Log-probabilities, lengths and pairs.
        beta: The regularisation tau of the paper, > 0.

    Returns:
        `(T,)` losses.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    per_token = scores.logratios / scores.lengths
    return (per_token[scores.yw_idxs] - per_token[scores.yl_idxs] - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid_loss, "hinge": hinge_loss, "ipo": ipo_loss}
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
