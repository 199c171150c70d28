"""What may lie in CPU memory instead of the device's: activations for the backward pass, and the input embeddings."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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


# ---- input embeddings ------------------------------------------------------------------------------------------------


class _TableOnCpu(nn.Module):
    """Of an embedding: its weight stays in CPU memory, and the rows that were looked up go where the ids are."""

    def forward(self, ids: Tensor) -> Tensor:
        """`(...)` token ids -> `(..., H)`, on the ids' device."""
        rows = super().forward(ids.cpu())
        return rows if rows.device == ids.device else rows.pin_memory().to(ids.device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts as asked, and never moves: an empty tensor shows what `fn` would make of the weight."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)


def _device_of_the_rest(model: Any) -> torch.device:
    """Where a model with such an embedding computes; transformers takes it to be the place of its first parameter."""
    table = model.get_input_embeddings().weight
    return next(parameter.device for parameter in model.parameters() if parameter is not table)


def _embedding_class(cls: Any) -> type:
    """The class of embeddings with its weight in CPU memory."""
    return type(cls.__name__, (_TableOnCpu, cls), {"__module__": cls.__module__})


def _model_class(cls: Any) -> type:
    """The class of models with its device known; all that goes by its name finds the same."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "device": property(_device_of_the_rest)})


def keep_embeddings_on_cpu(model: PreTrainedModel) -> None:
    """Put the input embeddings into CPU memory, where moving the model leaves them and saving finds them.

    Raises:
        ValueError: If the head shares their weight, or the model is spread over devices.
        NotImplementedError: If they are no table of rows, or several processes train on CUDA devices.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        raise NotImplementedError(
            f"`embeddings_on_cpu` must be False for embeddings that are no nn.Embedding, got {type(table).__name__}. "
            "Leave it out."
        )
    if head is not None and head.weight is table.weight:
        raise ValueError(
            f"`embeddings_on_cpu` must be False where the head shares their weight, got {type(model).__name__} with "
            "tied embeddings, which must be on the device anyway. Leave it out."
        )
    if hasattr(table, "_hf_hook"):
        raise ValueError(
            "`embeddings_on_cpu` must be False for a model that `device_map` spreads, got one. Drop one of them."
        )
    if torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise NotImplementedError(
            f"`embeddings_on_cpu` must be False on several processes, got {os.environ['WORLD_SIZE']}: DDP takes one "
            "kind of device. Leave it out, or start one process."
        )
    table.to("cpu")
    table.__class__ = _embedding_class(type(table))
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and next(part.parameters()) is table.weight:
            part.__class__ = _model_class(type(part))


def has_embeddings_on_cpu(model: PreTrainedModel) -> bool:
    """Whether `keep_embeddings_on_cpu` was called for the model."""
    return isinstance(model.get_input_embeddings(), _TableOnCpu)


def require_frozen_embeddings(policy: Any) -> None:
    """Refuse to train embeddings that are kept in CPU memory.

    Raises:
        ValueError: If an adapter of the policy does.
    """
    tables = [module for module in policy.modules() if isinstance(module, _TableOnCpu)]
    if tables and policy.get_base_model().get_input_embeddings() not in tables:
        raise ValueError(
            "`embeddings_on_cpu` must be False where the embeddings are trained, got an adapter that does. Leave them "
            "out of its `target_modules`, `modules_to_save` and `trainable_token_indices`."
        )
