"""Logits of a head: what a model does to them, and how many of them exist at a time.

Shapes: n positions, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_BYTES, MOST_TILE_ELEMENTS, TILE_POSITIONS = 2**24, 2**24, 128
"""Size of a tile of logits when no chunk size is asked for: 16 MiB, which a large cache holds; more for 128 positions,
as with fewer a matrix product mostly reads the head, but no more than 2^24 logits."""

STRIP_ELEMENTS = {"cpu": 2**20, "cuda": 2**22}
"""Logits of a tile that are in fp32 at a time: as many as a core's own cache holds, or as a GPU is busy with."""


@dataclass(frozen=True)
class LogitRule:
    """What a model does to its head's output: multiply by `scale`, then soft-cap at `softcap` (0: none)."""

    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> "LogitRule":
        """Read the rule from a model's text config.

        Cohere names the factor `logit_scale`, Falcon-H1 `lm_head_multiplier`, others `output_multiplier`; Granite
        divides by `logits_scaling`, HyperCLOVA X multiplies by it; Gemma 2 soft-caps by `final_logit_softcapping`.
        `proof.check_logit_rule` compares the result with the model's own logits before it is trusted.
        """
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        factors = [value for name in names if (value := getattr(config, name, None)) is not None]
        scaling = getattr(config, "logits_scaling", None)
        if not factors and scaling is not None:
            factors = [scaling if config.model_type == "hyperclovax" else 1 / scaling]
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale=float(factors[0]) if factors else 1.0, softcap=float(softcap or 0.0))

    def apply(self, logits: Tensor) -> Tensor:
        """Scaled and capped logits, same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if not self.softcap else torch.tanh(logits / self.softcap) * self.softcap

    def derivative(self, ruled: Tensor) -> Tensor | float:
        """d(ruled)/d(raw), from the ruled logits: the derivative of tanh is 1 - tanh^2."""
        if not self.softcap:
            return self.scale
        return (ruled / self.softcap).square_().neg_().add_(1).mul_(self.scale)


def widen(x: Tensor) -> Tensor:
    """fp32 of 16-bit values; fp32 and fp64 as they are, so that nothing narrows fp64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def chunk_length(vocabulary: int, chunk_size: int | None, width: int) -> int:
    """Positions in a tile: `chunk_size`, or by the size of its logits of `width` bytes.

    >>> chunk_length(16_384, None, 2), chunk_length(16_384, None, 4), chunk_length(262_144, None, 2)
    (512, 256, 64)
    """
    if chunk_size:
        return chunk_size
    few, most = TILE_BYTES // (width * vocabulary), max(16, MOST_TILE_ELEMENTS // vocabulary)
    return min(max(few, TILE_POSITIONS), most)


def strip_length(vocabulary: int, device: str) -> int:
    """Positions of a tile that are in fp32 at a time, so that a pass over them finds in a cache what the last one left.

    >>> strip_length(16_384, "cpu"), strip_length(128_256, "cpu"), strip_length(128_256, "cuda")
    (64, 8, 32)
    """
    return max(1, STRIP_ELEMENTS.get(device, STRIP_ELEMENTS["cuda"]) // vocabulary)


def top_token(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of `(n, V)`, four times as fast on a CPU: the first of the best blocks, and the first in it.

    >>> top_token(torch.tensor([[1.0, 3.0] * 8 + [0.0] * 16])).tolist()
    [1]
    """
    size = math.gcd(logits.shape[-1], 256)
    if size < 16:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, size))
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    return best[:, 0] * size + blocks.take_along_dim(best[..., None], 1)[:, 0].argmax(-1)
