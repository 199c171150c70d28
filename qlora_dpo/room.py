"""What `auto` means on the machine at hand: how many tokens fit in a forward, how many layers can be kept."""

import contextlib
import functools
import os
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
from qlora_dpo.offload import has_embeddings_on_cpu
from qlora_dpo.recompute import decoder_layers

MARGIN = 0.1
"""Share of a card that is left free: how far a plan may be off."""

CONTAINER = Path("/sys/fs/cgroup")
CONTAINER_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Where Linux says what memory a container may use and does, in control groups of version 2 and 1."""


def card_memory(device: torch.device) -> int | None:
    """Bytes that this process has and can get on a GPU, less a margin; None elsewhere.

    Where PyTorch is held to a share of the card (`torch.cuda.set_per_process_memory_fraction`), that is all it can get.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device.index))  # None is the current one
    context = MemoryOptions().device_context_bytes  # which counts in a plan, as does what is mine
    return int((1 - MARGIN) * (min(free + mine, share) + context))


def host_memory() -> int:
    """Bytes that this process has and can get in CPU memory.

    Half of what is free, as other programs need some too, shared with the other processes of the training.
    """
    return psutil.Process().memory_info().rss + spare_host_memory()


def spare_host_memory() -> int:
    """Bytes of CPU memory that this process can get beside what it has."""
    free = psutil.virtual_memory().available
    for names in CONTAINER_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit in it
            limit, used = (int(Path(CONTAINER, name).read_text()) for name in names)
            free = min(free, limit - used)
    return max(free, 0) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_of(device: torch.device) -> int | None:
    """Bytes that this process has and can get where it trains; None where that is not known."""
    return host_memory() if device.type == "cpu" else card_memory(device)


def plan_for(policy: PeftModel, args: Any, card: int, tokens: int, device: torch.device) -> MemoryPlan:
    """The memory plan of a policy as it is to be trained.

    Args:
        policy: The policy.
        args: The configuration.
        card: Bytes of the card.
        tokens: Unique tokens of a forward.
        device: Where it is trained.
    """
    base = policy.get_base_model()
    if getattr(base, "is_loaded_in_8bit", False):
        raise NotImplementedError("A base must be in 4 or 16 bit to be planned, got one in 8 bit. Use one in 4 bit.")
    ranks = [getattr(policy.peft_config[name], "r", None) for name in trained_adapters(policy)]
    options = MemoryOptions(
        tokens=tokens,
        lora_r=max([rank for rank in ranks if isinstance(rank, int)], default=MemoryOptions().lora_r),
        gradient_checkpointing=args.recomputes,
        quantize=is_quantized(base),
        use_bnb_nested_quant=_has_nested_constants(base),
        dtype={"bf16": "bfloat16", "fp16": "float16"}.get(args.arithmetic, "float32"),
        optim=args.optim if args.optim in OPTIMIZERS else MemoryOptions().optim,
        activation_offloading=args.activation_offloading,
        quantize_head=hasattr(base.get_output_embeddings(), "compute_dtype"),
        embeddings_on_cpu=has_embeddings_on_cpu(base) and device.type != "cpu",
        precompute_ref_log_probs=args.precompute_ref_log_probs,
        logps_chunk_size=args.logps_chunk_size,
        device="cpu" if device.type == "cpu" else "cuda",
    )
    return plan_memory(base.config, gpu_bytes=card, **vars(options))


def _has_nested_constants(base: torch.nn.Module) -> bool:
    """Whether the quantisation constants of a base are quantised too, as its first 4-bit layer has it."""
    states = (getattr(parameter, "quant_state", None) for parameter in base.parameters())
    first = next((state for state in states if state is not None), None)
    return MemoryOptions().use_bnb_nested_quant if first is None else bool(first.nested)


def _planned(policy: PeftModel, args: Any, card: int, tokens: int, device: torch.device) -> MemoryPlan | None:
    """The plan; None for a model that cannot be planned, which is said once: it trains all the same."""
    try:
        return plan_for(policy, args, card, tokens, device)
    except (NotImplementedError, ValueError) as error:
        _say_unplanned(str(error))
        return None


@functools.cache
def _say_unplanned(reason: str) -> None:
    """Warn of it, once in a process for each reason."""
    warnings.warn(
        "`auto` sets no token budget and keeps no layers here, where there is no plan. Set `max_tokens_per_forward` if "
        f"memory runs out. The reason: {reason}",
        stacklevel=4,
    )


def budget_for(policy: PeftModel, args: Any, device: torch.device, others: int = 0) -> int | None:
    """The token budget that `max_tokens_per_forward` asks for; `auto` is none on a CPU and where there is no plan.

    Args:
        policy: The policy.
        args: The configuration.
        device: Where it is trained.
        others: Bytes of the card that other models take.
    """
    if args.max_tokens_per_forward != "auto":
        return args.max_tokens_per_forward
    card = card_memory(device)
    plan = None if card is None else _planned(policy, args, max(1, card - others), 1, device)
    if plan is not None and not plan.largest_tokens:
        warnings.warn(f"By its plan the model leaves no room to train on the card:\n{plan}", stacklevel=2)
    return None if plan is None else plan.largest_tokens or None


def kept_layers_for(policy: PeftModel, args: Any, device: torch.device, tokens: int, others: int = 0) -> int:
    """The number of layers that `keep_layers` asks for.

    `auto` is none where layers are kept anyway, where activations are to go elsewhere, and where there is no plan.

    Args:
        policy: The policy.
        args: The configuration.
        device: Where it is trained.
        tokens: Unique tokens of the largest forward.
        others: Bytes of the memory there that other models take.
    """
    if args.keep_layers != "auto":
        return int(args.keep_layers or 0)
    layers, memory = len(decoder_layers(policy.get_base_model())), memory_of(device)
    some = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1) > 1  # which recompute, and the rest not
    if not layers or not args.recomputes or some or args.activation_offloading or memory is None:
        return 0
    plan = _planned(policy, args, max(1, memory - others), tokens, device)
    low, high = 0, 1 if plan is None else layers + 1  # `low` fits or is 0
    while plan is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan.changed(keep_layers=middle).fits else (low, middle)
    return low
