"""Gradient checkpointing: which decoder layers keep their activations for the backward pass instead of recomputing."""

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


def keep_activations(model: Any) -> None:
    """Turn off gradient checkpointing."""
    if hasattr(model, "activation_checkpointing_disable"):  # the newer name
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a causal LM's decoder that can recompute themselves, first to last.

    Empty if the model's code is not built of transformers' own layers.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return [layer for layer in lists[0] if isinstance(layer, GradientCheckpointingLayer)] if lists else []
