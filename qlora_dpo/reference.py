"""Which reference the policy is compared with: one call, from a batch to `(B,)` log-probabilities.

The reference pass runs before the policy's, so its activations never sit on top of the policy's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_dpo.forward import noise_off, score_batch
from qlora_dpo.model import is_fresh, is_quantized

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that subtract the adapter's start from the base's weights."""


class Reference(Protocol):
    """Scores completions under the reference."""

    @property
    def kind(self) -> str:
        """`base` or `none`, as `qlora_dpo.json` has it."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`(B,)` log-probabilities in nats, without gradient."""


@contextlib.contextmanager
def adapters_disabled(policy: PeftModel) -> Iterator[None]:
    """The base model inside the block; adapters and every `requires_grad` as before after it, even after an error.

    PEFT's own context manager leaves all weights of the active adapter trainable, also those the user had frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with policy.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class BaseReference:
    """The base model: the policy with its adapters disabled."""

    policy: PeftModel
    chunk_size: int | None = None
    kind: str = "base"

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`(B,)` log-probabilities under the base, in nats."""
        with torch.no_grad(), adapters_disabled(self.policy), noise_off(self.policy):
            return score_batch(model, batch, chunk_size=self.chunk_size)["logps"]


@dataclass(frozen=True)
class NoReference:
    """No reference: log-probabilities of zero, so rewards are beta log pi."""

    kind: str = "none"

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`(B,)` zeros."""
        return torch.zeros(len(batch["lengths"]), device=batch["targets"].device)


def make_reference(kind: str, policy: PeftModel, chunk_size: int | None = None) -> Reference:
    """The reference that the option `reference` names.

    Args:
        kind: `auto`, `base` or `none`.
        policy: The model to train.
        chunk_size: Positions in a tile of logits.

    Raises:
        NotImplementedError: If the policy's start is not its base model and `auto` is asked for.
        ValueError: If training the adapter would change the base model itself.
    """
    require_token_adapters(policy)
    if kind == "none":
        return NoReference()
    require_intact_base(policy)
    if kind == "auto" and not is_fresh(policy):
        raise NotImplementedError(
            "`reference='auto'` needs a fresh adapter for now, got one that is trained. Pass reference='base' to "
            "compare with the base model, or merge the adapter into the base and start a new one."
        )
    return BaseReference(policy, chunk_size)


def require_token_adapters(policy: PeftModel) -> None:
    """Refuse adapters that do more than change what a layer does to each token by itself.

    Raises:
        NotImplementedError: For prompt learning, activated LoRA, AdaLoRA, and DoRA on a quantised base.
    """
    for name in policy.active_adapters:
        config = policy.peft_config[name]
        kind = config.peft_type.value
        refused = None
        if config.is_prompt_learning:
            refused = f"{kind}, which adds tokens to the row"
        elif getattr(config, "alora_invocation_tokens", None):
            refused = "activated LoRA, which looks for tokens in the row"
        elif kind == "ADALORA":
            refused = "AdaLoRA, whose ranks nothing here updates"
        elif getattr(config, "use_dora", False) and is_quantized(policy.get_base_model()):
            refused = "DoRA on a quantised base, which does not start at the base"
        if refused is not None:
            raise NotImplementedError(
                f"The adapter must be made of layers that act on each token, got {refused}. Use LoRA."
            )


def require_intact_base(policy: PeftModel) -> None:
    """Refuse adapters that train parts of the base, which would make the reference drift.

    Raises:
        ValueError: For trained biases, whole modules and base weights, and initialisations that change the base.
    """
    for name in policy.active_adapters:
        config = policy.peft_config[name]
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"`init_lora_weights` must leave the base as it is, got {start!r}: the model with its adapters "
                "disabled would not be the policy's start. Use init_lora_weights=True or 'gaussian'."
            )
        for option, neutral in (("bias", "none"), ("modules_to_save", None)):
            value = getattr(config, option, neutral)
            if value not in (neutral, [], None):
                raise ValueError(
                    f"`{option}` must be {neutral!r}, got {value!r}: it trains the base model, which is the reference. "
                    "Use reference='none' or leave it out."
                )
    strays = [name for name, p in policy.named_parameters() if p.requires_grad and policy.base_model.prefix not in name]
    if strays:
        raise ValueError(
            f"Only adapter weights must be trainable, got {strays[:3]} too: the base model is the reference. "
            "Freeze them with requires_grad_(False)."
        )
