"""What may lie in CPU memory instead of the device's: activations for the backward pass."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

LEAST_BYTES = 2**20
"""Activations below this stay: many small copies cost more than they free."""


# ---- activations -----------------------------------------------------------------------------------------------------


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Copy a tensor into page-locked CPU memory; returns what copies it back.

    Both copies wait for nothing but the work queued before them on the device's stream, so the device's memory may be
    used anew at once and the way back reads what has arrived.
    """
    device, kept = tensor.device, torch.empty_like(tensor, device="cpu", pin_memory=True)
    kept.copy_(tensor, non_blocking=True)
    return lambda: kept.to(device, non_blocking=True)


@contextlib.contextmanager
def activations_moved(
    model: nn.Module,
    device_type: str = "cuda",
    least_bytes: int = LEAST_BYTES,
    move: Callable[[Tensor], Callable[[], Tensor]] = to_cpu,
) -> Iterator[None]:
    """What autograd saves in the block is moved away until the backward pass asks for it.

    Weights stay, as do views of them. With gradient checkpointing the inputs of recomputed layers are what is saved;
    what a layer saves while it is recomputed, outside the block, is not moved.

    Args:
        model: The model whose weights stay.
        device_type: The device whose tensors are moved.
        least_bytes: Smaller tensors stay.
        move: Moves a tensor away, and returns what brings it back.
    """
    weights = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        once = _without_repeats(tensor)
        large = tensor.device.type == device_type and once.nbytes >= least_bytes
        if not large or _memory(tensor) in weights or _overlaps(once):
            return tensor
        shape, strides, bring_back = tensor.shape, once.stride(), move(once)
        return lambda: _with_strides(bring_back(), strides).expand(shape)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _memory(tensor: Tensor) -> int:
    """Where a tensor's memory begins, the same for all its views."""
    return tensor.untyped_storage().data_ptr()


def _without_repeats(tensor: Tensor) -> Tensor:
    """One of the rows that an expanded tensor repeats."""
    sizes = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(sizes, tensor.stride())


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share a place in memory, as in overlapping windows."""
    reach = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < reach:
            return True
        reach += step * (size - 1)
    return False


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers laid out as before, gaps included: kernels round by the layout they find."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
