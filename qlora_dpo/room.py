"""What the options `auto` mean on the card at hand: how many tokens fit in a forward, how many layers can be kept."""

from typing import Any

import torch
from peft import PeftModel

from qlora_dpo.adapters import trained_adapters
from qlora_dpo.errors import FixableError
from qlora_dpo.footprint import OPTIMIZERS, MemoryOptions
from qlora_dpo.memory import MemoryPlan, plan_memory
from qlora_dpo.model import is_quantized
from qlora_dpo.recompute import decoder_layers

MARGIN = 0.1
"""Share of a card that is left free: how far a plan may be off."""


def card_memory(device: torch.device) -> int | None:
    """Bytes that this process has and can get on a GPU, less a margin; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device) + MemoryOptions().device_context_bytes  # both count in a plan
    return int((1 - MARGIN) * (free + mine))


def plan_for(policy: PeftModel, args: Any, card: int, tokens: int) -> MemoryPlan:
    """The memory plan of a policy as it is to be trained.

    Args:
        policy: The policy.
        args: The configuration.
        card: Bytes of the card.
        tokens: Unique tokens of a forward.
    """
    base = policy.get_base_model()
    ranks = [getattr(policy.peft_config[name], "r", None) for name in trained_adapters(policy)]
    options = MemoryOptions(
        tokens=tokens,
        lora_r=max([rank for rank in ranks if isinstance(rank, int)], default=MemoryOptions().lora_r),
        gradient_checkpointing=bool(args.gradient_checkpointing),
        quantize=is_quantized(base),
        compute_dtype={"bf16": "bfloat16", "fp16": "float16"}.get(args.arithmetic, "float32"),
        optim=args.optim if args.optim in OPTIMIZERS else MemoryOptions().optim,
        activation_offloading=args.activation_offloading,
        quantize_head=hasattr(base.get_output_embeddings(), "compute_dtype"),
        embeddings_on_cpu=base.get_input_embeddings().weight.device.type == "cpu",
        cached_reference=args.precompute_ref_log_probs,
        logps_chunk_size=args.logps_chunk_size,
    )
    return plan_memory(base.config, gpu_bytes=card, **vars(options))


def budget_for(policy: PeftModel, args: Any, device: torch.device) -> int | None:
    """The token budget that `max_tokens_per_forward` asks for.

    Raises:
        FixableError: If `auto` finds no room for a single token.
    """
    asked, card = args.max_tokens_per_forward, card_memory(device)
    if asked != "auto" or card is None:
        return None if asked == "auto" else asked
    plan = plan_for(policy, args, card, tokens=1)
    if not plan.largest_tokens:
        raise FixableError(f"The model must leave room to train on the card, got:\n{plan}")
    return plan.largest_tokens


def kept_layers_for(policy: PeftModel, args: Any, device: torch.device, tokens: int) -> int:
    """The number of layers that `keep_layers` asks for.

    Args:
        policy: The policy.
        args: The configuration.
        device: Where it is trained.
        tokens: Unique tokens of the largest forward.
    """
    asked, card = args.keep_layers, card_memory(device)
    if asked != "auto" or card is None:
        return 0 if asked == "auto" else int(asked or 0)
    plan, layers = plan_for(policy, args, card, tokens), len(decoder_layers(policy.get_base_model()))
    low, high = 0, layers + 1  # `low` fits or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan.changed(keep_layers=middle).fits else (low, middle)
    return low
