"""A frozen 4-bit LM head, a piece of the vocabulary at a time: the head in 16 bit never exists.

Each piece is dequantised once a pass, and its logits go into sums over the vocabulary that are kept relative to the
largest logit so far (Milakov and Gimelshein 2018). The row W[y] - sum_v p_v W[v] that the backward pass needs is such
a sum too, so that no logit is computed twice.

Legend: N scored positions, n of them in a tile or strip, H hidden size, V vocabulary, v of it in a piece.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_dpo.bare import is_bare
from qlora_dpo.logits import TILE_POSITIONS, LogitRule, chunk_length, strip_length, top_token, widen

PIECE_ELEMENTS, STATE_ELEMENTS = 2**24, 2**22
"""Weights of the head that are dequantised at a time, 32 MiB in 16 bit; hidden states of a tile of positions."""


def tile_shape(hidden: int, vocabulary: int, chunk_size: int | None, width: int) -> tuple[int, int]:
    """Positions and tokens of a tile of logits, for a hidden size and numbers of `width` bytes.

    >>> tile_shape(4096, 128_256, None, 2), tile_shape(512, 8_192, None, 2)
    ((1024, 4096), (1024, 8192))
    """
    tokens = min(vocabulary, max(1, PIECE_ELEMENTS // hidden))
    most = max(TILE_POSITIONS, STATE_ELEMENTS // hidden)
    return chunk_size or min(chunk_length(tokens, None, width), most), tokens


class HeadRows:
    """Rows of a 4-bit head, dequantised when asked for. A row is a whole number of blocks with a scale each."""

    def __init__(self, head: Linear4bit, dtype: torch.dtype) -> None:
        state = head.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        self.count, self.size = head.out_features, head.in_features
        self._packed = head.weight.data.view(torch.uint8).view(self.count, -1)
        self._scales = scales.float().view(self.count, -1)
        self._state, self._dtype = state, dtype

    def __getitem__(self, ids: slice | Tensor) -> Tensor:
        """`(v, H)` of some token ids."""
        packed, scales = self._packed[ids], self._scales[ids]
        state = QuantState(
            scales.reshape(-1),
            shape=torch.Size((len(packed), self.size)),
            code=self._state.code,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self._dtype,
        )
        return dequantize_4bit(packed.reshape(-1, 1), state)


def _computes_in(head: Linear4bit, hidden: Tensor) -> torch.dtype:
    """The dtype of the head's products, as bitsandbytes and autocast choose it."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.compute_dtype or hidden.dtype


def _logits(head: Linear4bit, hidden: Tensor) -> Tensor:
    """`(..., H)` -> `(..., V)`, as the layer itself computes them."""
    dtype = _computes_in(head, hidden)
    states, weights = hidden.to(dtype), HeadRows(head, dtype)
    _, length = tile_shape(weights.size, weights.count, None, dtype.itemsize)
    firsts = range(0, weights.count, length)
    logits = torch.cat([states @ weights[first : first + length].t() for first in firsts], dim=-1)
    return (logits if head.bias is None else logits + head.bias.to(dtype)).to(hidden.dtype)


def by_pieces(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A head as a function that never dequantises it whole, where that can be."""
    return partial(_logits, head) if isinstance(head, Linear4bit) and has_plain_rows(head) else head


@contextlib.contextmanager
def called_by_pieces(head: nn.Module | None) -> Iterator[None]:
    """Inside the block, let a model call its head `by_pieces`."""
    if head is None or not has_plain_rows(head):
        yield
        return
    head.forward = by_pieces(head)
    try:
        yield
    finally:
        del head.forward


def has_plain_rows(head: nn.Module) -> bool:
    """Whether a head is a frozen 4-bit layer whose rows can be dequantised apart, with nothing acting on its calls."""
    if type(head) is not Linear4bit or not is_bare(head):
        return False
    state = getattr(head.weight, "quant_state", None)
    return (
        state is not None
        and tuple(state.shape) == (head.out_features, head.in_features)
        and head.in_features % state.blocksize == 0
        and not getattr(state, "packing_format_for_cpu", False)
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


class _Sums:
    """Sums over the vocabulary of N positions, of all tokens but the target, whose part is added at the end.

    Without it, `others / (others + e^(at - top))` is 1 - p_y to the last bit. All but `plain` are times e^-top.
    """

    def __init__(self, targets: Tensor, statistics: Sequence[str], dtype: torch.dtype) -> None:
        def filled(value: float) -> Tensor:
            return torch.full((len(targets), 1), value, dtype=dtype, device=targets.device)

        self.targets, self.statistics = targets, statistics
        self.top, self.at = filled(-torch.inf), filled(-torch.inf)
        self.others, self.weighted, self.squares, self.plain = (filled(0.0) for _ in range(4))
        self.best = torch.zeros_like(targets)

    def add(self, rows: slice, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Take in logits `(n, v)` of some rows, from token id `first` on. They are overwritten.

        Returns:
            `(n, v)` e^(logit - top), 0 for the target; `(n, 1)` what sums of earlier pieces shrink by.
        """
        column = self.targets[rows, None] - first
        here = (column >= 0) & (column < logits.shape[1])
        column = column.clamp(0, logits.shape[1] - 1)
        self.at[rows] = torch.where(here, logits.gather(1, column), self.at[rows])
        before, highest = self.top[rows].clone(), logits.amax(-1, keepdim=True)
        if "mean_logits" in self.statistics:
            self.plain[rows] += logits.sum(-1, keepdim=True)
        if "is_top1" in self.statistics:
            self.best[rows] = torch.where((highest > before)[:, 0], top_token(logits) + first, self.best[rows])
        top = torch.maximum(before, highest)
        shrink = torch.exp(before - top)
        weights = (logits - top).exp_()
        weights.scatter_(1, column, weights.gather(1, column).masked_fill_(here, 0.0))
        self.others[rows] = self.others[rows] * shrink + weights.sum(-1, keepdim=True)
        if "entropy" in self.statistics:
            self.weighted[rows] = self.weighted[rows] * shrink + logits.mul_(weights).sum(-1, keepdim=True)
        if "log_sum_sq_probs" in self.statistics:
            squares = torch.mul(weights, weights, out=logits).sum(-1, keepdim=True)
            self.squares[rows] = self.squares[rows] * shrink.square() + squares
        self.top[rows] = top
        return weights, shrink

    def scores(self, vocabulary: int) -> dict[str, Tensor]:
        """`token_logps` and the statistics, each `(N,)`, as `logps.tile_scores` names them."""
        own = torch.exp(self.at - self.top)
        total = self.others + own
        normaliser = torch.log(total)
        found = {
            "token_logps": self.at - self.top - normaliser,
            "entropy": self.top + normaliser - (self.weighted + own * self.at) / total,
            "mean_logits": self.plain / vocabulary,
            "is_top1": (self.best == self.targets).to(own.dtype)[:, None],
            "log_sum_sq_probs": torch.log(self.squares + own.square()) - 2 * normaliser,
        }
        return {name: found[name][:, 0] for name in ("token_logps", *self.statistics)}


def four_bit_head_scores(
    hidden: Tensor,
    head: Linear4bit,
    targets: Tensor,
    rule: LogitRule,
    chunk_size: int | None,
    statistics: Sequence[str],
    unit_gradient: Tensor | None,
) -> dict[str, Tensor]:
    """`token_logps` and statistics, each `(N,)`, at least fp32.

    Args:
        hidden: `(N, H)` hidden states at the scored positions.
        head: A layer that `has_plain_rows`.
        targets: `(N,)` token ids.
        rule: Scale and soft-cap of the model.
        chunk_size: Positions in a tile of logits; None for `logits.chunk_length`'s.
        statistics: By name as in `logps.tile_scores`.
        unit_gradient: `(N, H)`, filled with d logp / d hidden; None if it is not wanted.
    """
    dtype = _computes_in(head, hidden)
    states, weights = hidden.to(dtype), HeadRows(head, dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    sums = _Sums(targets, statistics, wide)
    pulled = None if unit_gradient is None else torch.zeros_like(hidden, dtype=wide)
    chunk, length = tile_shape(weights.size, weights.count, chunk_size, dtype.itemsize)
    for first in range(0, weights.count, length):
        ids = slice(first, min(first + length, weights.count))
        part = None if bias is None else bias[ids]
        _add_piece(sums, pulled, states, weights[ids], part, first, rule, chunk)
    if unit_gradient is not None and pulled is not None:
        total = sums.others + torch.exp(sums.at - sums.top)
        own = sums.others / total * rule.derivative(sums.at)
        pulled /= -total
        few = max(1, STATE_ELEMENTS // 4 // weights.size)
        for start in range(0, len(hidden), few):
            rows = slice(start, start + few)
            unit_gradient[rows] = pulled[rows] + own[rows] * weights[targets[rows]]
    return sums.scores(weights.count)


def _add_piece(
    sums: _Sums,
    pulled: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    rule: LogitRule,
    chunk: int,
) -> None:
    """Take in the tokens from id `first` on that a piece `(v, H)` of the head is for, tile by tile of positions.

    `pulled` `(N, H)` becomes the sum over tokens of e^(logit - top) W, each times the slope of the logit rule.
    """
    for start in range(0, len(hidden), chunk):
        tile = slice(start, min(start + chunk, len(hidden)))
        _add_tile(sums, pulled, tile, nn.functional.linear(hidden[tile], weight, bias), weight, first, rule)


def _add_tile(
    sums: _Sums, pulled: Tensor | None, tile: slice, raw: Tensor, weight: Tensor, first: int, rule: LogitRule
) -> None:
    """Take in raw logits `(n, v)` of a tile of positions, strip by strip; they are overwritten."""
    shrinks: list[Tensor] = []
    gains: list[Tensor] = []
    low = tile.start
    for strip in raw.split(strip_length(len(weight), weight.device.type)):
        rows = slice(low, low + len(strip))
        logits = rule.apply(widen(strip))
        slope = 1.0 if pulled is None else rule.derivative(logits)
        weights, shrink = sums.add(rows, logits, first)
        shrinks.append(shrink)
        if pulled is not None:
            gains += _write_pull(weights, slope, strip)
        low = rows.stop
        del logits, slope, weights  # before the next strip is widened
    if pulled is not None:
        product = raw @ weight
        pulled[tile].mul_(torch.cat(shrinks)).add_(product * torch.cat(gains) if gains else product)


def _write_pull(weights: Tensor, slope: Tensor | float, raw: Tensor) -> list[Tensor]:
    """Write e^(logit - top), times the slope, into `raw` `(n, v)`; in fp16, as shares of what is returned, `(n, 1)`.

    Shares add up to 1,024: fp16 has nothing below 6e-8, and a product of what adds up to more could pass 65,504.
    """
    if isinstance(slope, Tensor) or slope != 1.0:  # a pass saved
        weights *= slope
    gains = []
    if raw.dtype is torch.float16:
        gains = [weights.abs().sum(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).tiny * 1024) / 1024]
        weights /= gains[0]
    raw.copy_(weights)
    return gains
