"""What each option saves of a training's memory: measured, beside what `qlora-dpo plan` foretells.

    python scripts/memory_ladder.py [--model DIR] [--tokens 1024 2048] [--pairs 4] [--output FILE.json]

A model in NF4 (by default a 41M Llama of random weights), LoRA of rank 16, bf16, prompts with a pair each. `held` is
what model, adapters, gradients and optimizer state take, `step` the fullest moment of a step above that: what PyTorch's
allocator has handed out, on a GPU by its own count, on a CPU byte by byte (`tests/allocations.py`). Options that need a
CUDA device are measured on one.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_footprint import MODELS, held_by, random_model, trainer_on

from qlora_dpo import plan_memory
from qlora_dpo.callbacks import KeepLayers
from qlora_dpo.layouts import Group
from qlora_dpo.recompute import checkpoint_activations, keep_activations

from allocations import peak_of
from surroundings import surroundings

MIB = 2**20
ON_GPU = torch.cuda.is_available()


def groups(tokens: int, pairs: int, vocabulary: int) -> list[Group]:
    """Pairs of which half of the tokens are the prompt, a quarter each completion."""
    generator = torch.Generator().manual_seed(0)
    size = tokens // pairs

    def ids(count: int) -> list[int]:
        return torch.randint(10, vocabulary, (count,), generator=generator).tolist()

    return [Group(ids(size // 2), [ids(size // 4 + 1), ids(size // 4 + 1)], [(0, 1)]) for _ in range(pairs)]


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes at the fullest moment of a run above what was there before."""
    if not ON_GPU:
        return peak_of(run).bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held(trainer: Any) -> int:
    """Bytes of model, adapters, gradients and optimizer state where the training is."""
    if not ON_GPU:
        return held_by(trainer)
    gc.collect()
    return torch.cuda.memory_allocated()


def step_bytes(trainer: Any, tokens: int, pairs: int, budget: int | None = None) -> int | None:
    """Bytes of a step above what is held; None where the device has no room for it."""
    trainer.data_collator.layout, trainer.data_collator.max_tokens = "tree", budget
    sample = {"groups": groups(tokens, pairs, trainer.model.config.vocab_size), "max_tokens": budget}
    sample |= trainer.data_collator.place(sample["groups"])

    trainer.model.train()

    def run() -> None:
        for piece in sample["pieces"]:  # not `training_step`, which makes do with less where memory runs out
            loss = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(piece), False, pairs)
            trainer.accelerator.backward(loss)
            del loss  # what its graph holds must not lie beside the next forward

    if "parts" in sample["pieces"][0]:
        raise ValueError(f"`--tokens` must leave whole groups in a budget of {budget}, got {tokens}. Take more pairs.")
    try:
        return peak_above(run)
    except torch.OutOfMemoryError:
        return None


Rung = tuple[str, dict[str, Any], int | None]
"""What an option is called, what the plan is asked for, and the bytes of the step."""


def rungs(trainer: Any, tokens: int, pairs: int) -> Iterator[Rung]:
    """Options of a loaded model, one after the other."""
    model, layers = trainer.model, trainer.model.config.num_hidden_layers
    base = model.get_base_model()
    keep_activations(base)
    yield "no checkpointing", {"gradient_checkpointing": False}, step_bytes(trainer, tokens, pairs)
    checkpoint_activations(model)
    KeepLayers(base, layers // 2).begin()
    yield f"keep_layers={layers // 2}", {"keep_layers": layers // 2}, step_bytes(trainer, tokens, pairs)
    checkpoint_activations(model)
    yield "gradient_checkpointing", {}, step_bytes(trainer, tokens, pairs)
    if ON_GPU:
        trainer.args.activation_offloading = True
        yield "and activation_offloading", {"activation_offloading": True}, step_bytes(trainer, tokens, pairs)
        trainer.args.activation_offloading = False
    trainer.step.chunk_size = trainer.reference.chunk_size = 32
    yield "and logps_chunk_size=32", {"logps_chunk_size": 32}, step_bytes(trainer, tokens, pairs)
    trainer.step.chunk_size = trainer.reference.chunk_size = None
    for part in (2, 4):
        if pairs % part == 0:
            budget = tokens // part
            plan = {"tokens": budget, "scored_tokens": budget // 2}
            yield f"and max_tokens_per_forward={budget}", plan, step_bytes(trainer, tokens, pairs, budget)


def loaded_otherwise(config: PreTrainedConfig) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Options that a model is loaded with: what they are called, of the loader and trainer, and of the plan.

    The head of a model that was saved in 4 bit stays as it was saved.
    """
    own_head = not config.tie_word_embeddings
    if own_head and getattr(config, "quantization_config", None) is None:
        yield "and quantize_head", {"quantize_head": True}, {"quantize_head": True}
    if own_head and ON_GPU:
        yield "and embeddings_on_cpu", {"embeddings_on_cpu": True}, {"embeddings_on_cpu": True}
    if ON_GPU:
        yield "and optim=adamw_8bit", {"optim": "adamw_8bit"}, {"optim": "adamw_8bit"}


def row(found: Rung, config: PreTrainedConfig, tokens: int, held_bytes: int) -> dict[str, Any]:
    """A measurement beside its plan."""
    name, options, measured = found
    defaults = {"tokens": tokens, "scored_tokens": tokens // 2, "dtype": "bfloat16"}
    place = {"device": "cuda" if ON_GPU else "cpu", "device_context_bytes": 0}
    plan = plan_memory(config, **(defaults | place | options))
    planned = sum(plan.held.values())
    return {
        "option": name,
        "tokens": tokens,
        "step_bytes": measured,
        "planned_step_bytes": plan.peak_bytes - planned,
        "held_bytes": held_bytes,
        "planned_held_bytes": planned,
        "peak_plan_over_measured": None if measured is None else plan.peak_bytes / (held_bytes + measured),
    }


def measure(model: str, config: PreTrainedConfig, all_tokens: Sequence[int], pairs: int) -> Iterator[dict[str, Any]]:
    """Every option at every number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for options in (None, *loaded_otherwise(config)):
            name, loading, planned = options or ("", {}, {})
            gc.collect()
            trainer = trainer_on(model, folder, torch.bfloat16, **loading)
            size = held(trainer)
            for tokens in all_tokens:
                if options is None:
                    yield from (row(rung, config, tokens, size) for rung in rungs(trainer, tokens, pairs))
                    continue
                checkpoint_activations(trainer.model)
                yield row((name, planned, step_bytes(trainer, tokens, pairs)), config, tokens, size)
            del trainer


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, in MiB."""
    lines = ["| option | tokens | step | plan | held | plan | peak, plan/measured |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        step = "out of memory" if r["step_bytes"] is None else f"{r['step_bytes'] / MIB:,.0f}"
        sizes = [f"{r[key] / MIB:,.0f}" for key in ("planned_step_bytes", "held_bytes", "planned_held_bytes")]
        ratio = "" if r["step_bytes"] is None else f"{r['peak_plan_over_measured']:.3f}"
        lines.append(f"| {r['option']} | {r['tokens']:,} | {step} | {' | '.join(sizes)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and perhaps write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or id of a base model; by default a 41M Llama of random weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--pairs", type=int, default=4, help="prompts with a pair each, among which tokens are shared")
    parser.add_argument("--output", help="where to write JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = MODELS["llama-41m"]
        if args.model is None:
            random_model(config, folder)
        else:
            config = AutoConfig.from_pretrained(args.model)
        found = surroundings() | {"model": args.model or "llama-41m", "pairs": args.pairs, "rows": []}
        for measured in measure(args.model or folder, config, args.tokens, args.pairs):
            found["rows"] = sorted([*found["rows"], measured], key=lambda row: row["tokens"])
            if ON_GPU:
                free, total = torch.cuda.mem_get_info()
                found["context_bytes"] = total - free - torch.cuda.memory_reserved()
            if args.output:  # after each, as the next one may fail
                Path(args.output).write_text(json.dumps(found, indent=2) + "\n")
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
