"""Attention for rows that hold many sequences, registered as a backend of transformers.

Each `Segment` of a row attends to its prefix and, causally, to itself, and to nothing else. The segments arrive as a
forward keyword, in a `RowPlan`, so a layer that is recomputed in the backward pass sees the same ones. How it is
computed is chosen in `kernels`.

Legend: h query heads, g key/value heads, L positions of the row, d and d_v head sizes of queries and values.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from qlora_dpo.kernels import Recipe, attend
from qlora_dpo.segments import RowPlan

BACKEND = "qlora_dpo_segments"
"""Name of the backend in transformers' `AttentionInterface`."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: RowPlan | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The backend: attention of one row, each segment for itself.

    Args:
        module: The model's attention layer.
        query: `(1, h, L, d)`.
        key: `(1, g, L, d)`.
        value: `(1, g, L, d_v)`.
        attention_mask: Must be None: the segments say who sees whom.
        scaling: Factor on the scores; None for d^-1/2.
        dropout: Probability of dropping an attention weight.
        sliding_window: Positions a query sees, itself included; None for all.
        softcap: Soft-cap on the scores.
        s_aux: `(h,)` attention sinks.
        segments: The plan of the row's segments.
        position_bias: Must be None: a bias built from the row is not carried.
        **kwargs: What else a model passes; none of it changes who sees whom.

    Returns:
        `(1, L, h, d_v)` and None for the attention weights.

    Raises:
        NotImplementedError: If the model's attention needs something the segments cannot say.
    """
    if segments is None or attention_mask is not None or position_bias is not None:
        got = "none" if segments is None else "a mask or bias of its own too"
        raise NotImplementedError(
            f"{type(module).__name__} must hand `segments` alone to its attention, got {got}. Use "
            "batch_layout='padded'."
        )
    recipe = Recipe(scaling, sliding_window, dropout, softcap, s_aux)
    return attend(query, key, value, segments, recipe), None


AttentionInterface.register(BACKEND, segment_attention)


@contextlib.contextmanager
def attention_backend(config: PreTrainedConfig, name: str | None) -> Iterator[None]:
    """Let the model with this config attend with the backend `name` inside the block, and with its own outside it."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def recompute_with_same_attention(model: nn.Module, config: PreTrainedConfig) -> None:
    """Let gradient checkpointing recompute a layer with the backend its forward used.

    The layers are recomputed in the backward pass, when the model attends with its own backend again. Without this
    the recomputed activations would silently come from another attention. Idempotent; call it before each forward, as
    whoever enables checkpointing sets the function anew.
    """
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not hasattr(run, "keeps_attention"):
            module._gradient_checkpointing_func = _keeping_attention(run, config)  # type: ignore[assignment]


def _keeping_attention(run: Callable[..., Any], config: PreTrainedConfig) -> Callable[..., Any]:
    """`run(layer, *args)`, a checkpoint function, with the layer bound to the backend in force at the call."""

    @functools.wraps(run)
    def checkpointed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = config._attn_implementation

        def same_layer(*inputs: Any, **named: Any) -> Any:
            with attention_backend(config, name):
                return layer(*inputs, **named)

        return run(same_layer, *args, **kwargs)

    checkpointed.keeps_attention = True  # type: ignore[attr-defined]
    return checkpointed
