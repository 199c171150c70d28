"""What PyTorch's CPU allocator hands out while something runs, byte for byte.

Every tensor on a CPU comes from one allocator, which tells the profiler of each block it hands out and takes back. So
the running total is exact, unlike resident memory, and holds temporaries inside operators (those of attention, of
bitsandbytes), which a `TorchDispatchMode` does not see. It does not see scratch memory of MKL and oneDNN or Python's
own objects; blocks that were there before do not count, and neither does giving one of them back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once, and whose they were.

    Attributes:
        bytes: Above what was alive at the start.
        alive: Bytes and the operators around the allocation, outermost first, of each block alive then.
    """

    bytes: int
    alive: list[tuple[int, str]]


def peak_of(run: Callable[[], Any]) -> Peak:
    """Run something and find its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    alive: dict[int, tuple[int, str]] = {}
    now, peak = 0, Peak(0, [])
    for _, address, change, path in sorted(_events(profiler), key=lambda event: event[0]):
        if change > 0:
            now += change
            alive[address] = (change, path)
        else:
            now -= alive.pop(address, (0, ""))[0]
        if now > peak.bytes:
            peak = Peak(now, list(alive.values()))
    return peak


def _events(profiler: profile) -> list[tuple[int, int, int, str]]:
    """Time, address, bytes (negative where given back) and operators of each event of the allocator."""
    found = []
    stack = [(root, "") for root in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, path = stack.pop()
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size, path))
        stack.extend((child, f"{path}/{event.name}") for child in event.children)
    return found


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
