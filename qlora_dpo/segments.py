"""The segments of a row, and what attention needs of them: computed once per forward, for all of its layers.

Nothing here depends on queries or keys, so layers share it, and so do layers that are recomputed in the backward pass.

Legend: S segments, L positions of the row, q queries and k keys of one segment, K keys of all segments together,
g key/value heads, d head size, n = ceil(L / 128) blocks.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from qlora_dpo.layouts import Segment

BLOCK = 128
"""Side of a tile of the mask that FlexAttention skips or computes as a whole: its default."""


def visible(length: int, prefix_length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`(q, k)` mask of a segment over its prefix and itself, True where a query may look; None if plainly causal.

    The key at index j has position j, the query at index i has position `prefix_length + i`: a lower-right-aligned
    causal mask. A sliding window w lets a query see itself and the w - 1 positions before it.

    >>> visible(2, 1, None, torch.device("cpu")).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    keys = prefix_length + length
    if window is not None and window >= keys:
        window = None
    if prefix_length == 0 and window is None:
        return None
    distance = torch.arange(prefix_length, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def expanded(x: Tensor, heads: int, dim: int) -> Tensor:
    """Key/value heads, in dimension `dim`, repeated until there is one for each query head."""
    groups = heads // x.shape[dim]
    return x.repeat_interleave(groups, dim=dim) if groups > 1 else x


def prefix_and_own(x: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """`(1, g, L, d)` -> views of a segment's prefix and of the segment itself."""
    own = x[:, :, segment.start : segment.start + segment.length]
    return x[:, :, segment.prefix_start : segment.prefix_start + segment.prefix_length], own


def keys_of(x: Tensor, segment: Segment) -> Tensor:
    """`(1, g, L, d)` -> `(1, g, k, d)`: the prefix and the segment itself."""
    prefix, own = prefix_and_own(x, segment)
    return torch.cat((prefix, own), dim=2) if segment.prefix_length else own


@dataclass(frozen=True)
class EndToEnd:
    """The segments end to end, as kernels for sequences of different lengths take them.

    The queries of the segments are the row itself. A segment's keys are those of its prefix and its own, so that
    causal attention aligned to the lower right is what the segment should see.

    Attributes:
        keys: `(K,)` int32 position in the row of each key; None if the keys are the row itself too.
        own: `(L,)` int32, where among the keys each position's own one is; None likewise.
        prefixes: Of each segment that has a prefix: where its keys begin, where in the row it does, and its length.
        cu_q: `(S + 1,)` int32, where the queries of each segment start, and their number.
        cu_k: `(S + 1,)` int32, the same for the keys.
        max_q: Most queries of a segment, a host integer.
        max_k: Most keys of a segment, a host integer.
    """

    keys: Tensor | None
    own: Tensor | None
    prefixes: list[tuple[int, int, int]]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def gather(self, x: Tensor) -> Tensor:
        """`(L, g, d)` of the row -> `(K, g, d)` by segment."""
        return x if self.keys is None else _Gather.apply(x, self)


class _Gather(torch.autograd.Function):
    """x[keys], whose gradient is added up in the order of the segments, in fp32 at least, and rounded once.

    That of `index_select` is added up by atomics, in the dtype of x: a prompt's keys get a share from each completion,
    and no two runs would be the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: EndToEnd) -> Tensor:
        assert row.keys is not None
        ctx.row = row
        return x.index_select(0, row.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        found = upstream.index_select(0, ctx.row.own)
        wide = torch.promote_types(found.dtype, torch.float32)
        prompts: dict[int, int] = {}
        for _, start, length in ctx.row.prefixes:
            prompts[start] = max(length, prompts.get(start, 0))
        sums = {start: found[start : start + length].to(wide, copy=True) for start, length in prompts.items()}
        for first, start, length in ctx.row.prefixes:
            sums[start][:length] += upstream[first : first + length]
        for start, total in sums.items():
            found[start : start + len(total)] = total
        return found, None


class RowPlan:
    """The segments of one forward's row, with the masks and indices made from them when first asked for.

    Made anew for each forward and owned by it, so that nothing goes stale or outlives it. Neither a tuple nor a dict:
    what wraps a model passes it on as it is.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._made: dict[Hashable, Any] = {}

    def masks(self, window: int | None, device: torch.device) -> list[Tensor | None]:
        """`(q, k)` mask of each segment, as `visible` makes it."""
        return self._once(
            ("masks", window, device),
            lambda: [visible(s.length, s.prefix_length, window, device) for s in self.segments],
        )

    def end_to_end(self, device: torch.device) -> EndToEnd:
        """The segments end to end."""
        return self._once(("end_to_end", device), lambda: _end_to_end(self.segments, device))

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """`(L, L)` mask of the whole row, for FlexAttention."""
        return self._once(("block_mask", window, device), lambda: _block_mask(self.segments, window, device))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _end_to_end(segments: Sequence[Segment], device: torch.device) -> EndToEnd:
    queries = [s.length for s in segments]
    keys = [s.prefix_length + s.length for s in segments]
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys)]
    firsts = list(zip(segments, bounds[1].tolist(), strict=False))  # where the keys of each segment begin
    prefixes = [(first, s.prefix_start, s.prefix_length) for s, first in firsts if s.prefix_length]
    if prefixes:
        runs = [(s.prefix_start, s.prefix_length) for s in segments], [(s.start, s.length) for s in segments]
        pieces = [torch.arange(first, first + n) for pair in zip(*runs, strict=True) for first, n in pair]
        own = [torch.arange(s.length) + first + s.prefix_length for s, first in firsts]
        bounds += [torch.cat(pieces), torch.cat(own)]
    there = sent(device, torch.cat(bounds).int()).split([len(part) for part in bounds])
    positions, own_positions = there[2:] if prefixes else (None, None)
    return EndToEnd(positions, own_positions, prefixes, there[0], there[1], max(queries), max(keys))


def sent(device: torch.device, host: Tensor) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device has to do before."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _bounds(segments: Sequence[Segment], window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the query at each position of the row sees: `own..itself` and `prefix..prefix_end - 1`, each `(L,)`."""
    table = torch.tensor([(s.start, s.prefix_start, s.prefix_start + s.prefix_length) for s in segments])
    own, prefix, prefix_end = table.repeat_interleave(torch.tensor([s.length for s in segments]), dim=0).unbind(1)
    if window is None:
        return own, prefix, prefix_end
    reach = torch.arange(len(own)) - window + 1
    # The prefix ends where the run starts, whatever lies between them in the row.
    return torch.maximum(own, reach), torch.maximum(prefix, prefix_end + reach - own), prefix_end


def _block_mask(segments: Sequence[Segment], window: int | None, device: torch.device) -> BlockMask:
    """The mask by its bounds and by blocks; `create_block_mask` would hold `(L, L)` values on the way."""
    # Contiguous: compiled code cannot read columns of one table everywhere.
    own, prefix, prefix_end = (sent(device, bound.int().contiguous()) for bound in _bounds(segments, window))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= own[q]) & (k <= q)) | ((k >= prefix[q]) & (k < prefix_end[q]))

    length = len(own)
    blocks = -(-length // BLOCK)
    first = torch.arange(blocks, device=device) * BLOCK
    last = first + BLOCK - 1
    q, low, start, end = (bound[:, None] for bound in (torch.arange(length, device=device), own, prefix, prefix_end))
    some = ((low <= last) & (q >= first)) | ((start <= last) & (end > first) & (start < end))
    every = ((low <= first) & (q >= last)) | ((start <= first) & (end > last))

    def by_block(rows: Tensor) -> Tensor:
        """`(L, n)` -> `(n, 128, n)`; the rows beyond the last see nothing."""
        return F.pad(rows, (0, 0, 0, blocks * BLOCK - length)).view(blocks, BLOCK, blocks)

    whole = by_block(every).all(1)
    partial = by_block(some).any(1) & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """`(n, n)` booleans -> `(1, 1, n)` how many a row has chosen, `(1, 1, n, n)` indices, the chosen first; int32."""
    indices = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], indices.int()[None, None]
