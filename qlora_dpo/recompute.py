"""Gradient checkpointing: which decoder layers keep their activations for the backward pass instead of recomputing."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(model: Any) -> None:
    """Turn on gradient checkpointing that works with frozen embeddings: the non-reentrant kind."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a causal LM's decoder that can recompute themselves, first to last.

    Empty if the model's code is not built of transformers' own layers.
    """
    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def keep_last_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Let the last layers keep their activations and the others recompute them. Idempotent.

    Args:
        layers: Those of a model whose checkpointing is on.
        count: How many are kept; more than there are is all.
    """
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < len(layers) - count  # type: ignore[assignment]
