"""Attention for rows that hold many sequences, registered as a backend of transformers.

Each `Segment` of a row attends to its prefix and, causally, to itself, and to nothing else. The segments arrive as a
forward keyword (host integers), so a layer that is recomputed in the backward pass sees the same ones.

Legend: h query heads, g key/value heads, L positions of the row, q queries and k keys of one segment, d head size.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from qlora_dpo.layouts import Segment

BACKEND = "qlora_dpo_segments"
"""Name of the backend in transformers' `AttentionInterface`."""


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


def _keys_of(x: Tensor, segment: Segment) -> Tensor:
    """`(1, g, L, d)` -> `(1, g, k, d)`: the prefix and the segment itself."""
    own = x[:, :, segment.start : segment.start + segment.length]
    if not segment.prefix_length:
        return own
    return torch.cat((x[:, :, segment.prefix_start : segment.prefix_start + segment.prefix_length], own), dim=2)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention written out, for soft-caps (Gemma 2) and sinks (gpt-oss), which SDPA does not take.

    Args:
        query: `(1, h, q, d)`.
        key: `(1, h, k, d)`.
        value: `(1, h, k, d_v)`.
        mask: `(q, k)`, True where a query may look; None for causal.
        scale: Factor on the scores; None for d^-1/2.
        dropout: Probability of dropping an attention weight.
        softcap: c of c tanh(score / c); None for none.
        sinks: `(h,)` logits of a sink that takes part in the softmax and has no value; None for none.

    Returns:
        `(1, h, q, d_v)`.
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float64 if scores.dtype is torch.float64 else torch.float32)
    weights = F.dropout(weights[..., : key.shape[2]].to(value.dtype), dropout)
    return weights @ value


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
    segments: list[Segment] | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The backend: attention of one row, segment by segment.

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
        segments: The runs of the row, in order and without gaps.
        position_bias: Must be None: a bias built from the row is not carried.
        **kwargs: What else a model passes; none of it changes who sees whom.

    Returns:
        `(1, L, h, d_v)` and None for the attention weights.

    Raises:
        NotImplementedError: If the model's attention needs something the segments cannot say.
    """
    if segments is None or attention_mask is not None or position_bias is not None:
        raise NotImplementedError(
            f"{type(module).__name__} does not hand `segments` to its attention, or adds a mask or bias of its own. "
            "Use batch_layout='padded'."
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    explicit = softcap is not None or s_aux is not None
    outputs = []
    for segment in segments:
        queries = query[:, :, segment.start : segment.start + segment.length]
        keys, values = _keys_of(key, segment), _keys_of(value, segment)
        mask = visible(segment.length, segment.prefix_length, sliding_window, query.device)
        if explicit:
            outputs.append(explicit_attention(queries, keys, values, mask, scaling, dropout, softcap, s_aux))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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
