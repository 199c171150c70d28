"""What each option saves of a step's memory on a CPU: measured byte by byte, beside what `qlora-dpo plan` foretells.

    python scripts/memory_ladder.py [--tokens 2048] [--output FILE.json]

A 41M Llama on NF4, LoRA of rank 16, bf16, four prompts with a pair each. Measured is what PyTorch's allocator has
handed out at the fullest moment of a step, above model, adapters and optimizer state (`tests/allocations.py`). Options
that need a CUDA device are in the plan only.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_footprint import MODELS, foretold, trainer_of

from qlora_dpo.callbacks import KeepLayers
from qlora_dpo.layouts import Group
from qlora_dpo.recompute import checkpoint_activations

from allocations import peak_of

MIB = 2**20
PAIRS = 4


def groups(tokens: int, vocabulary: int) -> list[Group]:
    """Pairs of which half of the tokens are the prompt, a quarter each completion."""
    generator = torch.Generator().manual_seed(0)
    size = tokens // PAIRS

    def ids(count: int) -> list[int]:
        return torch.randint(10, vocabulary, (count,), generator=generator).tolist()

    return [Group(ids(size // 2), [ids(size // 4 + 1), ids(size // 4 + 1)], [(0, 1)]) for _ in range(PAIRS)]


def measured(trainer: Any, tokens: int, budget: int | None = None) -> int:
    """Bytes at the fullest moment of a step above what was there before."""
    trainer.data_collator.layout, trainer.data_collator.max_tokens = "tree", budget
    sample = {"groups": groups(tokens, trainer.model.config.vocab_size), "max_tokens": budget}
    sample |= trainer.data_collator.place(sample["groups"])
    return peak_of(lambda: trainer.training_step(trainer.model_wrapped, sample, PAIRS)).bytes


def rungs(trainer: Any, tokens: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Options by what they are called, measured bytes, and what the plan is asked for."""
    model, layers = trainer.model, trainer.model.config.num_hidden_layers
    found: list[tuple[str, int, dict[str, Any]]] = []

    def rung(name: str, plan: dict[str, Any], prepare: Callable[[], Any] = lambda: None, **options: Any) -> None:
        checkpoint_activations(model)
        prepare()
        found.append((name, measured(trainer, tokens, **options), plan))

    def chunk(size: int | None) -> None:
        trainer.step.chunk_size = trainer.reference.chunk_size = size

    off = model.get_base_model().gradient_checkpointing_disable
    rung("no checkpointing", {"gradient_checkpointing": False}, off)
    rung(f"keep_layers={layers // 2}", {"keep_layers": layers // 2}, lambda: KeepLayers(model, layers // 2).begin())
    rung("gradient_checkpointing", {})
    rung("and logps_chunk_size=32", {"logps_chunk_size": 32}, lambda: chunk(32))
    chunk(None)
    for part in (2, 4):
        budget = tokens // part
        rung(f"and max_tokens_per_forward={budget}", {"tokens": budget}, budget=budget)
    return found


def quantized_head(tokens: int, folder: str) -> tuple[str, int, dict[str, Any]]:
    """The same for a head in 4 bit, whose own weights are smaller, too."""
    trainer = trainer_of(MODELS["llama-41m"], folder, torch.bfloat16, quantize_head=True)
    checkpoint_activations(trainer.model)
    head: nn.Module = trainer.model.get_output_embeddings()
    assert hasattr(head, "compute_dtype")
    return "and quantize_head", measured(trainer, tokens), {"quantize_head": True}


def main() -> None:
    """Measure, print a table and perhaps write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--output", help="where to write JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        trainer = trainer_of(MODELS["llama-41m"], one, torch.bfloat16)
        found = [*rungs(trainer, args.tokens), quantized_head(args.tokens, other)]
    lines = ["| option | measured, MiB | plan, MiB |", "|---|---|---|"]
    rows = []
    for name, size, options in found:
        plan = foretold(MODELS["llama-41m"], **({"tokens": args.tokens, "compute_dtype": "bfloat16"} | options))
        above = plan.peak_bytes - sum(plan.held.values())
        rows.append({"option": name, "measured_bytes": size, "plan_bytes": above})
        lines.append(f"| {name} | {size / MIB:.0f} | {above / MIB:.0f} |")
    print("\n".join(lines))
    if args.output:
        Path(args.output).write_text(json.dumps({"tokens": args.tokens, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
