"""Attention of a row on a CPU as one autograd function, a block of queries at a time, its backward by matrix products.

Blocks see only the keys that they can see at all, which spares the upper triangle of long completions, and take turns
with the same memory. Queries, keys and values are kept as the model made them. PyTorch's flash attention for CPUs is a
tenth slower forward, three times backward, and needs every segment's keys gathered and kept.

Precision: scores and softmax of the forward pass are in fp32 at least, weights are rounded for their product with the
values, as in eager attention. In the backward pass a product of 16-bit numbers is rounded once, when it is stored.
Scores are stored less their log-sum-exp, and the gradient of the weights less its mean under the weights: both are
small where a weight is large, so the rounding is small where it counts. What is taken off enters the product as two
more columns, a number and what its rounding left. What several blocks add to keys and values is added up in fp32.

Legend: h query heads, g key/value heads, r = h / g; L positions of the row, d head size, w queries of a block, n keys
that they see.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qlora_dpo.layouts import Segment
from qlora_dpo.segments import prefix_and_own

MOST_QUERIES, MOST_WEIGHTS = 256, 2**22
"""Queries of a block, and how many weights of all heads it may have before it gets fewer queries."""

GRAIN = 32
"""Queries and keys of a block are filled up to multiples of it: a product of a shape that has not been seen before is
compiled first, which takes as long as several such products."""


def _full(count: int) -> int:
    """The next multiple of the grain.

    >>> _full(64), _full(65)
    (64, 96)
    """
    return -(-count // GRAIN) * GRAIN


class _Block(NamedTuple):
    """Queries `first..last - 1` of a segment, and `keys` keys from `oldest` on, of its prefix, itself and filling."""

    first: int
    last: int
    oldest: int
    keys: int

    @property
    def queries(self) -> int:
        """With filling."""
        return _full(self.last - self.first)

    @property
    def seen(self) -> slice:
        """The keys."""
        return slice(self.oldest, self.oldest + self.keys)


def _blocks(segment: Segment, heads: int, window: int | None) -> Iterator[_Block]:
    """The blocks of a segment, of even size but for the last.

    >>> list(_blocks(Segment(20, 300, 0, 10), heads=1, window=100))
    [_Block(first=0, last=160, oldest=0, keys=192), _Block(first=160, last=300, oldest=71, keys=256)]
    """
    before, keys = segment.prefix_length, segment.prefix_length + segment.length
    most = max(GRAIN, min(MOST_QUERIES, MOST_WEIGHTS // (heads * keys)) // GRAIN * GRAIN)
    size = _full(math.ceil(segment.length / math.ceil(segment.length / most)))
    for first in range(0, segment.length, size):
        last = min(first + size, segment.length)
        oldest = 0 if window is None else max(0, before + first - window + 1)
        yield _Block(first, last, oldest, _full(before + last - oldest))


def _most_weights(segments: Sequence[Segment], heads: int, window: int | None) -> int:
    """Weights of the largest block."""
    return max(heads * b.queries * b.keys for segment in segments for b in _blocks(segment, heads, window))


def _piece(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of flat memory, in a shape: what blocks take turns with stays in the cache."""
    return memory[: math.prod(shape)].view(shape)


def _full_keys(x: Tensor, segment: Segment) -> Tensor:
    """`(1, g, L, d)` -> `(g, k, d)`: the prefix, the segment itself, and zeros that the last block reaches into."""
    prefix, own = prefix_and_own(x, segment)
    return torch.cat((prefix[0], own[0], x.new_zeros(x.shape[1], GRAIN, x.shape[-1])), dim=1)


def _full_queries(x: Tensor, segment: Segment, block: _Block, groups: int) -> Tensor:
    """`(1, h, L, d)` -> `(g, r w, d)`: the queries of a block, or what is theirs, and zeros after each head's."""
    rows = x[0, :, segment.start + block.first : segment.start + block.last]
    return functional.pad(rows, (0, 0, 0, block.queries - rows.shape[1])).reshape(groups, -1, x.shape[-1])


def _future(dtype: torch.dtype) -> Tensor:
    """-inf above the diagonal and 0 elsewhere, as large as a block's own keys can make it."""
    queries = max(GRAIN, MOST_QUERIES)
    return torch.full((queries, queries + GRAIN), -torch.inf, dtype=dtype).triu_(1)


def _hide(scores: Tensor, block: _Block, prefix_length: int, window: int | None, future: Tensor) -> None:
    """-inf, in place, where a query of `(g, r w, n)` scores must not look: at later keys, or at those it has left."""
    itself = prefix_length + block.first - block.oldest  # the key that the first query is
    per_head = scores.unflatten(1, (-1, block.queries))
    per_head[..., itself:] += future[: block.queries, : block.keys - itself]
    if window is not None:
        per_head += scores.new_full(per_head.shape[2:], -torch.inf).tril_(itself - window)


def _softmax_(scores: Tensor, with_sum: bool) -> Tensor | None:
    """Weights in the place of scores; where it is asked for, the log of the sum of their exponentials."""
    top = scores.amax(-1) if with_sum else None
    torch.softmax(scores, -1, out=scores)
    return None if top is None else top - scores.amax(-1).log_()  # the largest weight is e^(top - log sum)


class _RowAttention(torch.autograd.Function):
    """Softmax attention of every segment over its prefix and, causally, itself."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        scale: float,
        window: int | None,
    ) -> Tensor:
        heads, groups, size = query.shape[1], key.shape[1], query.shape[-1]
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:3], dtype=wide) if any(ctx.needs_input_grad) else None
        unused, future, most = query.new_empty((), dtype=wide), _future(wide), _most_weights(segments, heads, window)
        all_scores = query.new_empty(most, dtype=wide)
        all_weights = all_scores if wide is query.dtype else query.new_empty(most)
        for segment in segments:
            all_keys, all_values = _full_keys(key, segment).to(wide), _full_keys(value, segment)
            for block in _blocks(segment, heads, window):
                rows, count = slice(segment.start + block.first, segment.start + block.last), block.last - block.first
                q = _full_queries(query, segment, block, groups).to(wide)
                k, v = all_keys[:, block.seen], all_values[:, block.seen]
                scores, weights = (_piece(x, groups, q.shape[1], k.shape[1]) for x in (all_scores, all_weights))
                torch.baddbmm(unused, q, k.mT, beta=0, alpha=scale, out=scores)
                _hide(scores, block, segment.prefix_length, window, future)
                log_sum = _softmax_(scores, lse is not None)
                output[0, rows] = torch.bmm(weights.copy_(scores), v).view(heads, -1, size)[:, :count].transpose(0, 1)
                if lse is not None and log_sum is not None:
                    lse[0, :, rows] = log_sum.view(heads, -1)[:, :count]
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        ctx.save_for_backward(*(_alone(x) for x in (query, key, value)), output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """P = e^(S - lse), dV = P' dO, dS = P * (dO V' - delta) with delta = sum(dO * O), dQ = dS K, dK = dS' Q."""
        query, key, value, output, lse = ctx.saved_tensors
        heads, groups, size, scale = query.shape[1], key.shape[1], query.shape[-1], ctx.scale
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        delta = (upstream.to(lse.dtype) * output).sum(-1).transpose(1, 2)
        queries = _with_columns(query, _in_two(-lse / scale, query.dtype))
        upstreams = _with_columns(upstream.transpose(1, 2), _in_two(-delta, upstream.dtype))
        ones = key.new_ones(*key.shape[:-1], 2)
        keys, values = _with_columns(key, ones), _with_columns(value, ones)
        unused, future = query.new_empty(()), _future(query.dtype)
        all_weights, all_pulls = query.new_empty(2, _most_weights(ctx.segments, heads, ctx.window))
        for segment in ctx.segments:
            all_keys, all_values = _full_keys(keys, segment), _full_keys(values, segment)
            d_keys, d_values = (torch.zeros_like(x[..., :size], dtype=lse.dtype) for x in (all_keys, all_values))
            for block in _blocks(segment, heads, ctx.window):
                rows, count = slice(segment.start + block.first, segment.start + block.last), block.last - block.first
                q, above = (_full_queries(x, segment, block, groups) for x in (queries, upstreams))
                k, v = all_keys[:, block.seen], all_values[:, block.seen]
                weights, d_scores = (_piece(x, groups, q.shape[1], k.shape[1]) for x in (all_weights, all_pulls))
                torch.baddbmm(unused, q, k.mT, beta=0, alpha=scale, out=weights)
                _hide(weights, block, segment.prefix_length, ctx.window, future)
                weights.exp_()
                d_values[:, block.seen] += torch.bmm(weights.mT, above[..., :size])
                torch.bmm(above, v.mT, out=d_scores).mul_(weights)
                pulled = torch.baddbmm(unused, d_scores, k[..., :size], beta=0, alpha=scale)
                d_query[0, :, rows] = pulled.view(heads, -1, size)[:, :count]
                d_keys[:, block.seen].add_(torch.bmm(d_scores.mT, q[..., :size]), alpha=scale)
            for whole, piece in ((d_key, d_keys), (d_value, d_values)):
                prefix, own = prefix_and_own(whole, segment)
                prefix[0] += piece[:, : segment.prefix_length]
                own[0] += piece[:, segment.prefix_length :][:, : segment.length]
        return d_query, d_key, d_value, None, None, None


def _alone(x: Tensor) -> Tensor:
    """A copy of a slice of one fused projection, as to keep the slice would be to keep it all."""
    return x.clone(memory_format=torch.contiguous_format) if x.untyped_storage().nbytes() > x.nbytes else x


def _in_two(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., 2)` of a dtype: `x`, and what its rounding left."""
    rounded = x.to(dtype)
    return torch.stack((rounded, (x - rounded).to(dtype)), dim=-1)


def _with_columns(x: Tensor, columns: Tensor) -> Tensor:
    """`(1, h, L, d)` -> `(1, h, L, d + 2)`."""
    return torch.cat((x, columns), dim=-1)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float | None, window: int | None
) -> Tensor:
    """Attention of one row on a CPU, each segment over its prefix and, causally, itself; for bf16, fp32 and fp64.

    Args:
        query: `(1, h, L, d)`.
        key: `(1, g, L, d)`.
        value: `(1, g, L, d)`.
        segments: Of the row, in order and without gaps.
        scale: Factor on the scores; None for d^-1/2.
        window: Positions a query sees, itself included; None for all.

    Returns:
        `(1, L, h, d)`.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _RowAttention.apply(query, key, value, segments, factor, window)
