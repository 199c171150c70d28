"""What `auto` means on the machine at hand: how many tokens fit in a forward, how many layers can be kept."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel

from qlora_dpo.adapters import trained_adapters
from qlora_dpo.footprint import OPTIMIZERS, MemoryOptions
from qlora_dpo.memory import MemoryPlan, plan_memory
from qlora_dpo.model import is_quantized
from qlora_dpo.recompute import decoder_layers

MARGIN = 0.1
"""Share of a card that is left free: how far a plan may be off."""

CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux says what memory a container may use."""


def card_memory(device: torch.device) -> int | None:
    """Bytes that this process has and can get on a GPU, less a margin; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device) + MemoryOptions().device_context_bytes  # both count in a plan
    return int((1 - MARGIN) * (free + mine))


def host_memory() -> int:
    """Bytes that this process has and can get in CPU memory: half of what is free, as other programs need some too."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # the limit of a container, if it has one
        limit, used = (int(Path(CONTAINER, name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return psutil.Process().memory_info().rss + max(free, 0) // 2


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
        gradient_checkpointing=args.recomputes,
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
    """The token budget that `max_tokens_per_forward` asks for; `auto` is none on a CPU and where there is no plan."""
    asked, card = args.max_tokens_per_forward, card_memory(device)
    if asked != "auto" or card is None:
        return None if asked == "auto" else asked
    try:
        plan = plan_for(policy, args, card, tokens=1)
    except NotImplementedError:  # a mixture of experts
        return None
    if not plan.largest_tokens:
        warnings.warn(f"By its plan the model leaves no room to train on the card:\n{plan}", stacklevel=2)
    return plan.largest_tokens or None


def kept_layers_for(policy: PeftModel, args: Any, device: torch.device, tokens: int) -> int:
    """The number of layers that `keep_layers` asks for.

    `auto` is none where every layer is kept anyway, where activations are to go elsewhere, where the model is sharded,
    and where no plan can be made.

    Args:
        policy: The policy.
        args: The configuration.
        device: Where it is trained.
        tokens: Unique tokens of the largest forward.
    """
    if args.keep_layers != "auto":
        return int(args.keep_layers or 0)
    layers = len(decoder_layers(policy.get_base_model()))
    if not (layers and args.recomputes) or args.activation_offloading or args.fsdp or args.deepspeed:
        return 0
    try:
        plan = plan_for(policy, args, card_memory(device) or host_memory(), tokens)
    except NotImplementedError:
        return 0
    low, high = 0, layers + 1  # `low` fits or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan.changed(keep_layers=middle).fits else (low, middle)
    return low
