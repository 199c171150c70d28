"""Attention of a row on a CPU as one autograd function, a block of queries at a time, its backward by matrix products.

PyTorch's flash attention for CPUs computes the forward pass. It is given blocks of queries with the keys that they can
see at all, which spares the upper triangle of long completions. Its backward runs at a third of the speed of plain
matrix products and needs every segment's keys gathered and kept; here the backward is those products, and queries,
keys and values are kept as the model made them.

Precision: a product of 16-bit numbers is rounded once, when it is stored. Scores are stored less their log-sum-exp, and
the gradient of the weights less its mean under the weights: both are small where a weight is large, so the rounding is
small where it counts. What is taken off enters the product as two more columns, a number and what its rounding left.

Legend: h query heads, g key/value heads, r = h / g; L positions of the row, d head size, w queries of a block, n keys
that they see.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_dpo.layouts import Segment
from qlora_dpo.segments import keys_of, prefix_and_own

MOST_QUERIES, FEWEST_QUERIES, MOST_WEIGHTS = 256, 16, 2**23
"""Queries of a block, and how many weights of all heads it may have before it gets fewer queries."""


class _Block(NamedTuple):
    """Queries `first..last - 1` of a segment, and keys `oldest..newest - 1` of its prefix and itself."""

    first: int
    last: int
    oldest: int
    newest: int


def _blocks(segment: Segment, heads: int, window: int | None) -> Iterator[_Block]:
    """The blocks of a segment, of even size.

    >>> list(_blocks(Segment(20, 300, 0, 10), heads=1, window=200))
    [_Block(first=0, last=150, oldest=0, newest=160), _Block(first=150, last=300, oldest=0, newest=310)]
    """
    keys = segment.prefix_length + segment.length
    most = min(MOST_QUERIES, max(FEWEST_QUERIES, MOST_WEIGHTS // (heads * keys)))
    size = -(-segment.length // -(-segment.length // most))
    for first in range(0, segment.length, size):
        last = min(first + size, segment.length)
        oldest = 0 if window is None else max(0, segment.prefix_length + first - window + 1)
        yield _Block(first, last, oldest, segment.prefix_length + last)


def _hidden(block: _Block, prefix_length: int, window: int | None, like: Tensor) -> Tensor:
    """`(w, n)` with -inf where a query must not look and 0 elsewhere."""
    shape = (block.last - block.first, block.newest - block.oldest)
    itself = prefix_length + block.first - block.oldest  # the key that the first query is
    hidden = like.new_full(shape, -torch.inf).triu_(itself + 1)
    return hidden if window is None else hidden + like.new_full(shape, -torch.inf).tril_(itself - window)


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
        heads, groups = query.shape[1], key.shape[1]
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for segment in segments:
            all_keys, all_values = (_for_each_query_head(keys_of(x, segment), heads) for x in (key, value))
            for block in _blocks(segment, heads, window):
                rows = slice(segment.start + block.first, segment.start + block.last)
                seen = slice(block.oldest, block.newest)
                plain = window is None and block.newest == block.last - block.first
                found, found_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[0, :, rows].unflatten(0, (groups, -1)),
                    all_keys[:, :, seen],
                    all_values[:, :, seen],
                    is_causal=plain,
                    attn_mask=None if plain else _hidden(block, segment.prefix_length, window, query),
                    scale=scale,
                )
                output[0, rows], lse[0, :, rows] = found.flatten(0, 1).transpose(0, 1), found_lse.flatten(0, 1)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        ctx.save_for_backward(*(_alone(x) for x in (query, key, value)), output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """P = e^(S - lse), dV = P' dO, dS = P * (dO V' - delta) with delta = sum(dO * O), dQ = dS K, dK = dS' Q."""
        query, key, value, output, lse = ctx.saved_tensors
        heads, size, scale = query.shape[1], query.shape[-1], ctx.scale
        groups = key.shape[1]
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        delta = (upstream.to(lse.dtype) * output).sum(-1).transpose(1, 2)
        queries = _with_columns(query, _in_two(-lse / scale, query.dtype))
        upstreams = _with_columns(upstream.transpose(1, 2), _in_two(-delta, upstream.dtype))
        ones = key.new_ones(*key.shape[:-1], 2)
        keys, values = _with_columns(key, ones), _with_columns(value, ones)
        unused = query.new_empty(())
        for segment in ctx.segments:
            all_keys, all_values = keys_of(keys, segment)[0], keys_of(values, segment)[0]
            d_keys, d_values = (torch.zeros_like(x[..., :size]) for x in (all_keys, all_values))
            for block in _blocks(segment, heads, ctx.window):
                rows = slice(segment.start + block.first, segment.start + block.last)
                seen = slice(block.oldest, block.newest)
                q, above = (x[0, :, rows].reshape(groups, -1, size + 2) for x in (queries, upstreams))
                k, v = all_keys[:, seen], all_values[:, seen]
                weights = torch.baddbmm(unused, q, k.mT, beta=0, alpha=scale)  # (g, r w, n)
                _hide(weights, block, segment.prefix_length, ctx.window)
                weights.exp_()
                d_values[:, seen].baddbmm_(weights.mT, above[..., :size])
                d_scores = torch.bmm(above, v.mT).mul_(weights)
                d_query[0, :, rows] = torch.baddbmm(unused, d_scores, k[..., :size], beta=0, alpha=scale).view(
                    heads, -1, size
                )
                d_keys[:, seen].baddbmm_(d_scores.mT, q[..., :size], alpha=scale)
            for whole, piece in ((d_key, d_keys), (d_value, d_values)):
                prefix, own = prefix_and_own(whole, segment)
                prefix[0] += piece[:, : segment.prefix_length]
                own[0] += piece[:, segment.prefix_length :]
        return d_query, d_key, d_value, None, None, None


def _for_each_query_head(x: Tensor, heads: int) -> Tensor:
    """`(1, g, n, d)` -> `(g, r, n, d)`, the same memory for the heads of a group."""
    return x[0, :, None].expand(-1, heads // x.shape[1], -1, -1)


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


def _hide(scores: Tensor, block: _Block, prefix_length: int, window: int | None) -> None:
    """-inf, in place, where a query must not look: without a window, among the block's own keys only."""
    queries = block.last - block.first
    if window is None:
        block = block._replace(oldest=block.newest - queries)
    columns = block.newest - block.oldest
    per_head = scores.unflatten(1, (-1, queries))
    per_head[..., -columns:] += _hidden(block, prefix_length, window, scores)


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
