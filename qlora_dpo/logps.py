"""Log-probabilities of target tokens from hidden states, one tile of logits at a time.

Shapes: N scored positions, H hidden size, V vocabulary. The `(N, V)` logits never exist: only `(chunk, V)` of them,
in the policy pass, in the reference pass and in evaluation; and of those, only `(n, V)` in fp32.

Three ways to the same numbers: `any_head_token_scores` calls the head module itself and recomputes each tile in the
backward pass, so it carries any head (LoRA on the head, trainable); a plain frozen head, in 16 bit or in 4, needs two
matrix products instead of three.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlora_dpo.bare import is_bare
from qlora_dpo.four_bit_head import by_pieces, four_bit_head_scores, has_plain_rows
from qlora_dpo.logits import LogitRule, chunk_length, strip_length, top_token, widen

STATISTICS = ("entropy", "mean_logits", "is_top1")
"""Per-token statistics that are logged, read off the tiles beside the log-probability."""


def tile_scores(
    logits: Tensor, targets: Tensor, statistics: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Scores of one tile, which is used up: a pass over new memory costs more than arithmetic.

    Softmax is the fastest way to exponentials, one pass on a CPU. It divides them by a sum that loses many small terms
    beside a large one; what they add up to afterwards is free of that.

    Args:
        logits: `(n, V)` fp32 or wider; overwritten.
        targets: `(n,)` token ids.
        statistics: Of `entropy` in nats, `mean_logits` over the vocabulary, `is_top1` (1 if the target is the top
            token) and `log_sum_sq_probs`, the log of the sum of squared probabilities.

    Returns:
        `token_logps` in nats and the statistics, each `(n,)`; `(n, V)` probabilities times their `(n, 1)` sum, which is
        close to 1; that sum.
    """
    found: dict[str, Tensor] = {}
    if "mean_logits" in statistics:
        found["mean_logits"] = logits.mean(-1)
    if "is_top1" in statistics:
        found["is_top1"] = (top_token(logits) == targets).to(logits.dtype)
    chosen, top = logits.gather(-1, targets[:, None]), logits.amax(-1, keepdim=True)
    weights = torch.softmax(logits, -1, out=None if "entropy" in statistics else logits)
    total = weights.sum(-1, keepdim=True)
    normaliser = torch.log(total / weights.amax(-1, keepdim=True))  # the top token's exponential was 1
    found["token_logps"] = (chosen - top - normaliser)[:, 0]
    if "entropy" in statistics:
        found["entropy"] = (normaliser + top)[:, 0] - logits.mul_(weights).sum(-1) / total[:, 0]
    if "log_sum_sq_probs" in statistics:
        found["log_sum_sq_probs"] = torch.log((weights / total).square_().sum(-1))
    return {name: found[name] for name in ("token_logps", *statistics)}, weights, total


Find = Callable[[Tensor, Tensor | None], dict[str, Tensor]]
"""Scores from hidden states `(N, H)`; the tensor `(N, H)`, where there is one, is filled with d logp / d hidden."""


class _FrozenHead(torch.autograd.Function):
    """d logp_t / d hidden_t needs only the logits of t, and the upstream gradient of logp_t is one number.

    So the forward pass, while the softmax is there, stores the row W[y_t] - sum_v p_v W[v] (with the chain rule of the
    logit rule), and the backward pass multiplies it by that number: no logit is computed twice, none are kept, and the
    frozen weight gets no gradient buffer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, find: Find) -> tuple[Tensor, ...]:
        unit_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        outputs = tuple(find(hidden, unit_gradient).values())
        ctx.save_for_backward(*([] if unit_gradient is None else [unit_gradient]))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (unit_gradient,) = ctx.saved_tensors
        return (upstream[0][:, None] * unit_gradient).to(unit_gradient.dtype), None


def _scores_by_tile(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    rule: LogitRule,
    chunk_size: int | None,
    statistics: Sequence[str],
    unit_gradient: Tensor | None,
) -> dict[str, Tensor]:
    """Scores `(N,)` through a plain head; `unit_gradient` `(N, H)` is filled where it is wanted."""
    weight, bias = head.weight, head.bias
    chunk = chunk_length(weight.shape[0], chunk_size, weight.element_size())
    pieces: list[dict[str, Tensor]] = []
    for start in range(0, max(1, hidden.shape[0]), chunk):
        tile = slice(start, start + chunk)
        wanted = None if unit_gradient is None else unit_gradient[tile]
        pieces += _score_tile(hidden[tile], weight, bias, targets[tile], rule, statistics, wanted)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _score_tile(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rule: LogitRule,
    statistics: Sequence[str],
    unit_gradient: Tensor | None,
) -> list[dict[str, Tensor]]:
    """Scores by strip, from hidden states `(chunk, H)`; `unit_gradient` `(chunk, H)` is filled where it is wanted."""
    logits = nn.functional.linear(hidden, weight, bias)
    safe = 1024.0 if logits.dtype is torch.float16 else 1.0  # fp16 has nothing below 6e-8
    factor = None if unit_gradient is None else safe
    length = strip_length(weight.shape[0], weight.device.type)
    strips = zip(logits.split(length), targets.split(length), strict=True)
    scores = [_score_strip(strip, ids, rule, statistics, factor) for strip, ids in strips]
    if unit_gradient is not None:
        unit_gradient.copy_((logits @ weight.to(logits.dtype)).div_(safe))
    return scores


def _score_strip(
    raw: Tensor, targets: Tensor, rule: LogitRule, statistics: Sequence[str], factor: float | None
) -> dict[str, Tensor]:
    """Scores `(n,)` of raw logits `(n, V)`, over which `factor * d logp[y] / d raw` is written; None: anything may be.

    1 - p_y is made in fp32, before anything is rounded: in a product it would be lost where the target is likely.
    """
    logits = rule.apply(widen(raw))
    slope = 1.0 if factor is None else rule.derivative(logits)
    scores, weights, total = tile_scores(logits, targets, statistics)
    if factor is not None:
        pull = weights.div_(-total).scatter_add_(-1, targets[:, None], torch.ones_like(total))
        for scale in (slope, factor):
            if isinstance(scale, Tensor) or scale != 1.0:  # a pass saved
                pull *= scale
        raw.copy_(pull)
    return scores


def frozen_head_token_scores(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    rule: LogitRule,
    chunk_size: int | None = None,
    statistics: Sequence[str] = (),
) -> dict[str, Tensor]:
    """`token_logps` and, when asked, statistics through a plain frozen linear head.

    Args:
        hidden: `(N, H)` hidden states at the scored positions.
        head: The LM head, in 4 bit or not; its weight must not require a gradient.
        targets: `(N,)` token ids.
        rule: Scale and soft-cap of the model.
        chunk_size: Positions in a tile; None for `chunk_length`'s.
        statistics: Which statistics to compute too, by name as in `tile_scores`.

    Returns:
        `token_logps` `(N,)` in nats, differentiable in `hidden`, and `(N,)` per statistic without gradient; at least
        fp32.
    """

    def find(rows: Tensor, unit_gradient: Tensor | None) -> dict[str, Tensor]:
        if isinstance(head, Linear4bit):
            return four_bit_head_scores(rows, head, targets, rule, chunk_size, statistics, unit_gradient)
        return _scores_by_tile(rows, head, targets, rule, chunk_size, statistics, unit_gradient)

    return dict(zip(("token_logps", *statistics), _FrozenHead.apply(hidden, find), strict=True))


class _AnyHead(torch.autograd.Function):
    """`tile_scores` of logits that autograd goes on from, to the last bit those of a frozen head.

    So policy and reference agree exactly where they are the same, whichever of their heads is trained.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, statistics: Sequence[str]) -> tuple[Tensor, ...]:
        scores, weights, total = tile_scores(logits.clone(), targets, statistics)
        ctx.save_for_backward(weights, total, targets)
        outputs = tuple(scores.values())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """d logp[y] / d logits[v] = (v = y) - p[v]."""
        weights, total, targets = ctx.saved_tensors
        slope = upstream[0][:, None]
        return (weights * (-slope / total)).scatter_add_(-1, targets[:, None], slope), None, None


def any_head_token_scores(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    rule: LogitRule,
    chunk_size: int | None = None,
    statistics: Sequence[str] = (),
    vocabulary: int = 2**17,
) -> dict[str, Tensor]:
    """The same as `frozen_head_token_scores` for any head module, by recomputing each tile in the backward pass."""

    def score(rows: Tensor, ids: Tensor) -> dict[str, Tensor]:
        logits = rule.apply(widen(head(rows)))
        found = _AnyHead.apply(logits, ids.to(logits.device), statistics)  # a head may be elsewhere
        return dict(zip(("token_logps", *statistics), found, strict=True))

    chunk = chunk_length(vocabulary, chunk_size, width=4)
    pieces = []
    for start in range(0, hidden.shape[0], chunk):
        tile = slice(start, start + chunk)
        pieces.append(checkpoint(score, hidden[tile], targets[tile], use_reentrant=False))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _is_plain(head: nn.Linear) -> bool:
    """Whether a head is frozen, not packed, and there, and nothing acts on its calls."""
    return type(head) is nn.Linear and is_bare(head) and not any(p.requires_grad for p in head.parameters())


def token_scores(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    rule: LogitRule,
    chunk_size: int | None = None,
    statistics: Sequence[str] = (),
) -> dict[str, Tensor]:
    """`token_logps` and statistics `(N,)` by the fast path where the head is plain and frozen, else by the other."""
    if isinstance(head, nn.Linear) and (_is_plain(head) or has_plain_rows(head)):
        return frozen_head_token_scores(hidden, head, targets, rule, chunk_size, statistics)
    vocabulary = getattr(head, "out_features", 2**17)
    return any_head_token_scores(hidden, head, targets, rule, chunk_size, statistics, vocabulary)


def token_divergences(
    rows: tuple[Tensor, Tensor],
    head: Callable[[Tensor], Tensor],
    rule: LogitRule,
    chunk_size: int | None = None,
    vocabulary: int = 2**17,
) -> Tensor:
    """KL(policy || reference) of the distributions at each scored position, in nats, exactly and without gradient.

    Both distributions of a tile exist at a time, as the tiles of the head do.

    Args:
        rows: `(N, H)` hidden states at the scored positions, of the policy and of the reference.
        head: LM head of both.
        rule: Scale and soft-cap of both.
        chunk_size: Positions in a tile; None for half of `chunk_length`'s.
        vocabulary: Size of the vocabulary.

    Returns:
        `(N,)`, at least fp32; 0 where the distributions are the same.
    """
    chunk = chunk_size or max(8, chunk_length(vocabulary, None, width=4) // 2)
    logits, pieces = by_pieces(head), []
    with torch.no_grad():
        for start in range(0, rows[0].shape[0], chunk):
            tile = slice(start, start + chunk)
            log_p, log_q = (torch.log_softmax(rule.apply(widen(logits(hidden[tile]))), -1) for hidden in rows)
            pieces.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(pieces)


def sum_by_completion(values: Tensor, lengths: list[int]) -> Tensor:
    """Sum per-token values over each completion's run of tokens.

    Rows of a zero-padded matrix are summed, not scattered with atomics: two passes over the same values agree to the
    last bit on every device, which is what makes step-0 margins exactly zero.

    Args:
        values: `(N,)`, the tokens of completion 0, then of completion 1, ...
        lengths: B counts that add up to N.

    Returns:
        `(B,)`.

    >>> sum_by_completion(torch.tensor([1.0, 2.0, 3.0]), [2, 1]).tolist()
    [3.0, 3.0]
    """
    return nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True).sum(-1)
