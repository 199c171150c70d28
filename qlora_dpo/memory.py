"""Memory: what was used, and what a training will need, from a model's config before any download.

`plan_memory` adds up the counts of `footprint`. The phases of a step do not overlap, so the peak is what is held all
the time plus the largest phase.
"""

import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from qlora_dpo.footprint import OPTIMIZERS, TO_HOST, MemoryOptions, Shape, held, phases
from qlora_dpo.shapes import shape_of

GIB = 2**30


def peak_memory(device: torch.device) -> int:
    """Most memory used so far, in bytes: allocated by PyTorch on a GPU, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take, in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@dataclass(frozen=True)
class Saver:
    """An option that saves memory, called alike in `MemoryOptions` and `qlora-dpo train`, and its value."""

    name: str
    value: bool | str

    @property
    def flag(self) -> str:
        """It as words of a command line."""
        return f"--{self.name} {str(self.value).lower()}"

    @property
    def change(self) -> dict[str, Any]:
        """It as a keyword of `plan_memory`."""
        return {self.name: self.value}


SAVERS = (
    Saver("precompute_ref_log_probs", True),
    Saver("optim", "paged_adamw_8bit"),
    Saver("quantize_head", True),
    Saver("embeddings_on_cpu", True),
    Saver("gradient_checkpointing", True),
    Saver("activation_offloading", True),
)
"""Cheapest in speed first."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a training needs, in bytes.

    Attributes:
        shape: Sizes of the model.
        options: What was chosen.
        gpu_bytes: Memory of the card; None if there is none to compare with.
        held: Bytes that are there in every phase, by part.
        phases: For each phase of a step, the bytes that it holds on top at its fullest moment, by part.
    """

    shape: Shape
    options: MemoryOptions
    gpu_bytes: int | None
    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        """What is held all the time and the largest phase."""
        return sum(self.held.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the card; None without one."""
        return None if self.gpu_bytes is None else self.peak_bytes <= self.gpu_bytes

    def changed(self, **options: Any) -> "MemoryPlan":
        """The same model on the same card with other options."""
        return _plan(self.shape, replace(self.options, **options), self.gpu_bytes)

    @property
    def largest_tokens(self) -> int | None:
        """Most unique tokens of a forward on the card with these options; 0 if none fit, None without a card."""
        if self.gpu_bytes is None:
            return None
        low, high = 0, 1  # `low` fits or is 0
        while high < 2**30 and self.changed(tokens=high).fits:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.changed(tokens=middle).fits else (low, middle)
        return low

    def savings(self) -> dict[str, int]:
        """Bytes that each option that is not set yet would take off the peak, by its flag, largest first."""
        saved = {saver.flag: self.peak_bytes - self.changed(**saver.change).peak_bytes for saver in self._unset()}
        return dict(sorted(saved.items(), key=lambda item: -item[1]))

    def advice(self) -> list[str] | None:
        """Flags to set so that the tokens fit on the card, cheapest in speed first.

        Returns:
            None if no flags suffice, or without a card; an empty list if it fits as it is.
        """
        plan, chosen = self, list[Saver]()
        for saver in self._unset():
            if plan.fits:
                break
            if plan.changed(**saver.change).peak_bytes < plan.peak_bytes:
                plan, chosen = plan.changed(**saver.change), [*chosen, saver]
        if not plan.fits:
            return None
        for saver in reversed(chosen):  # what a later, larger one made needless, dearest first
            rest = [other for other in chosen if other is not saver]
            if self.changed(**_changes(rest)).fits:
                chosen = rest
        return [saver.flag for saver in chosen]

    def _unset(self) -> list[Saver]:
        """Options that save memory, are not set, and are possible with the model."""
        return [
            saver
            for saver in SAVERS
            if getattr(self.options, saver.name) != saver.value
            and not (saver.name == "optim" and OPTIMIZERS[self.options.optim] == 8)
            and not (saver.name == "quantize_head" and not self.options.quantize)
            and not (saver.name in _NEED_OWN_HEAD and not self.shape.head)
            and not (saver.name in TO_HOST and self.options.device == "cpu")
        ]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "model": self.shape.name,
            "parameters": self.shape.parameters,
            "options": asdict(self.options),
            "gpu_bytes": self.gpu_bytes,
            "held": self.held,
            "phases": self.phases,
            "peak_phase": self.peak_phase,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "largest_tokens": self.largest_tokens,
            "savings": self.savings(),
            "advice": self.advice(),
        }

    def __str__(self) -> str:
        options = self.options
        kind = "QLoRA" if options.quantize else "LoRA"
        lines = [
            f"{self.shape.name}: {self.shape.parameters / 1e9:.2f} B parameters, {kind} of rank {options.lora_r}, "
            f"{options.tokens:,} tokens a forward, {options.dtype}, in GiB",
            *_block("held all the time", self.held),
        ]
        for phase, parts in self.phases.items():
            if parts:
                lines += _block(f"{phase}, on top", parts, phase == self.peak_phase)
        lines.append(f"{'peak: held and the largest phase':46}{_gib(self.peak_bytes)}")
        return "\n".join(lines + self._verdict())

    def _verdict(self) -> list[str]:
        """What fits on the card, and what to do."""
        saved = [f"  {flag:38}{size / GIB:8.2f}" for flag, size in self.savings().items() if size >= GIB / 200]
        lines = ["", "would take off the peak:", *saved] if saved else []
        if self.gpu_bytes is None:
            return lines
        spare = (self.gpu_bytes - self.peak_bytes) / GIB
        what = f"fits, {spare:.2f} to spare" if self.fits else f"does not fit, {-spare:.2f} too much"
        lines += ["", f"on a card of {self.gpu_bytes / GIB:.2f} GiB: {what}"]
        most = self.largest_tokens
        if most:
            lines.append(f"most that fits with these options: --max_tokens_per_forward {most}")
        if not self.fits:
            advice = self.advice()
            lines.append(
                f"to fit {self.options.tokens:,} tokens: {' '.join(advice)}"
                if advice is not None
                else f"no options make {self.options.tokens:,} tokens fit{self._most_with_all()}"
            )
        return lines

    def _most_with_all(self) -> str:
        """What the options can do where they do not suffice."""
        most = self.changed(**_changes(self._unset())).largest_tokens
        return f"; with all of them, {most:,} do" if most else "; the weights alone are too much"


_NEED_OWN_HEAD = {"quantize_head", "embeddings_on_cpu"}
"""Options that a head tied to the embeddings rules out: they are one matrix, in 16 bit, on the GPU."""


def _changes(savers: list[Saver]) -> dict[str, Any]:
    return {saver.name: saver.value for saver in savers}


def _gib(size: int) -> str:
    return f"{size / GIB:10.2f}"


def _block(title: str, parts: dict[str, int], peak: bool = False) -> list[str]:
    """Lines of a group, its largest part first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    mark = "  <- the largest phase" if peak else ""
    return [
        f"{title:46}{_gib(sum(parts.values()))}{mark}",
        *(f"  {name:34}{_gib(size)}" for name, size in ordered),
    ]


def plan_memory(
    config_or_name: PreTrainedConfig | str,
    *,
    gpu_bytes: int | None = None,
    **options: Any,
) -> MemoryPlan:
    """What a training will need, in bytes by part, and what fits on a card; from the model's config alone.

    Args:
        config_or_name: A config of transformers, a built-in name (`qlora-dpo plan --list`), a folder or a Hub id,
            perhaps as `id@revision`, of which only config.json is read.
        gpu_bytes: Memory of the card.
        **options: Fields of `MemoryOptions`, whose help says what each is: `tokens`, `scored_tokens`, `lora_r`,
            `gradient_checkpointing`, `keep_layers`, `quantize`, `use_bnb_nested_quant`, `dtype`, `optim`,
            `activation_offloading`, `quantize_head`, `embeddings_on_cpu`, `precompute_ref_log_probs`,
            `logps_chunk_size`, `device`, `device_context_bytes`.

    Returns:
        The plan; printed, a table in GiB.

    Raises:
        ValueError: For a value out of range, an option that the model rules out, or what is no causal LM.
        TypeError: For an option that there is not.
        OSError: If the config cannot be had.
        NotImplementedError: For a model whose layers cannot be planned, or not on a CPU; the message says why.
    """
    if gpu_bytes is not None and gpu_bytes < 1:
        raise ValueError(f"`gpu_bytes` must be 1 or more, got {gpu_bytes}. Leave it out for a plan without a card.")
    known = [field.name for field in fields(MemoryOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"Options of plan_memory must be among {known}, got `{name}`. Remove it.")
    return _plan(shape_of(config_or_name), MemoryOptions(**options), gpu_bytes)


def _plan(shape: Shape, options: MemoryOptions, gpu_bytes: int | None) -> MemoryPlan:
    for name in _NEED_OWN_HEAD:
        if getattr(options, name) and not shape.head:
            raise ValueError(
                f"`{name}` must be False for {shape.name}, whose head is its embeddings, got True. Leave it out."
            )
    if options.device == "cpu" and not shape.attention.plain:
        raise NotImplementedError(
            f"`device` must be cuda to plan {shape.name}, whose attention (soft-capped scores, sinks, or values of "
            "another size than keys) keeps a score of each pair of tokens on a CPU, got cpu. Try a short run there."
        )
    return MemoryPlan(shape, options, gpu_bytes, held(shape, options), phases(shape, options))


def parse_bytes(text: str) -> int:
    """Bytes of `24GB`, `24`, `23.5GiB` or `8192MiB`; GB are taken as cards are sold, for GiB.

    >>> parse_bytes("24GB") == parse_bytes("24") == 24 * 2**30
    True

    Raises:
        ValueError: If it is no size.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(g|m)?(i?b)?", text.strip().lower())
    if not found or not float(found[1]):
        raise ValueError(f"`gpu` must be a size such as 24GB or 8192MiB, got {text}. Write one.")
    return int(float(found[1]) * (2**20 if found[2] == "m" else GIB))
