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

    Raises:
        ValueError: If there is none: the model's code is not built of transformers' own layers.
    """
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"`keep_layers` must be 0 for {type(model).__name__}, whose layers are not told apart, got another. Leave "
            "it out."
        )
    return layers


def keep_last_layers(layers: Sequence[nn.Module], count: int) -> None:
    """Let the last layers keep their activations; the others stay as checkpointing set them. Idempotent."""
    for layer in layers[len(layers) - count :]:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
