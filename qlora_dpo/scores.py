"""What a loss sees of a batch.

Shapes: B unique completions, T pairs, N scored tokens (completion 0's, then completion 1's, ...). A pair is two indices
into the B completions, so a completion that appears in three pairs is scored once and receives the summed gradient of
the three.
"""

from dataclasses import dataclass

import torch
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
        weights: `(T,)` factor of each pair's loss; None for 1.
        label_probs: `(T,)` probability that the chosen completion is the better one; None for 1.
        offsets: `(T,)` margin that a pair's rewards should have; None without.
        likelihood_logps: `(B,)` policy log-probabilities as likelihood terms see them, where a modifier has changed
            `pi_logps`; None where they are the same.
        pi_token_logps: `(N,)` policy log-probability of each token; None unless asked for.
        ref_token_logps: `(N,)` the same under the reference.
        pi_log_sum_sq_probs: `(N,)` log of the sum of the policy's squared probabilities at each token.
    """

    pi_logps: Tensor
    ref_logps: Tensor
    yw_idxs: Tensor
    yl_idxs: Tensor
    lengths: Tensor
    group: Tensor
    weights: Tensor | None = None
    label_probs: Tensor | None = None
    offsets: Tensor | None = None
    likelihood_logps: Tensor | None = None
    pi_token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    pi_log_sum_sq_probs: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """`(B,)` h = log pi(y|x) - log pi_ref(y|x), in nats."""
        return self.pi_logps - self.ref_logps

    @property
    def logratio_differences(self) -> Tensor:
        """`(T,)` D = h_w - h_l of each pair, in nats."""
        return self.differences(self.logratios)

    @property
    def log_likelihoods(self) -> Tensor:
        """`(B,)` log pi(y|x), in nats, whatever a modifier made of `pi_logps`."""
        return self.pi_logps if self.likelihood_logps is None else self.likelihood_logps

    def differences(self, values: Tensor) -> Tensor:
        """`(T,)` value of the chosen minus value of the rejected, of `(B,)` values."""
        return values[self.yw_idxs] - values[self.yl_idxs]

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`(T,)` of the chosen and `(T,)` of the rejected completions, of `(B,)` values."""
        return values[self.yw_idxs], values[self.yl_idxs]

    def rewards(self, beta: float) -> Tensor:
        """`(B,)` implicit rewards beta * h, without gradient."""
        return beta * self.logratios.detach()


SIDE_COLUMNS = (
    "pi_w",
    "pi_l",
    "likelihood_w",
    "likelihood_l",
    "ref_w",
    "ref_l",
    "length_w",
    "length_l",
    "weight",
    "offset",
)
"""Columns of `sides_table`: what a loss over pairs needs when it can no longer see completions."""


def sides_table(scores: Scores) -> Tensor:
    """Pairs as rows of numbers, which can be gathered from micro-batches, processes and evaluation batches.

    Returns:
        `(T, len(SIDE_COLUMNS))` in the dtype of `pi_logps`, differentiable in its first four columns.
    """
    like = scores.pi_logps
    ones = torch.ones_like(scores.yw_idxs, dtype=like.dtype)
    columns = [
        *scores.sides(like),
        *scores.sides(scores.log_likelihoods),
        *scores.sides(scores.ref_logps),
        *scores.sides(scores.lengths),
        ones if scores.weights is None else scores.weights,
        0 * ones if scores.offsets is None else scores.offsets,
    ]
    return torch.stack([column.to(like.dtype) for column in columns], dim=1)


def scores_of_sides(table: Tensor) -> Scores:
    """Scores of T pairs whose 2T completions are no longer shared, from a `sides_table`."""
    column = dict(zip(SIDE_COLUMNS, table.unbind(1), strict=True))
    both = {
        name: torch.cat((column[f"{name}_w"], column[f"{name}_l"])) for name in ("pi", "likelihood", "ref", "length")
    }
    pairs = torch.arange(len(table), device=table.device)
    return Scores(
        pi_logps=both["pi"],
        ref_logps=both["ref"],
        yw_idxs=pairs,
        yl_idxs=pairs + len(table),
        lengths=both["length"],
        group=torch.cat((pairs, pairs)),
        weights=column["weight"],
        offsets=column["offset"],
        likelihood_logps=both["likelihood"],
    )
