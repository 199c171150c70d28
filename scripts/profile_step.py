"""Where the time of a step goes: matrix products, dequantisation, casts, exponentials, elementwise, the rest.

    python scripts/profile_step.py --data preferences.jsonl --model DIR [--dtype bfloat16] [--output FILE.json]

The step is the one that `bench_vs_trl.py` times: forward of the reference, forward and backward of the policy. Each
operator's own time counts once, for the part it belongs to; what no operator accounts for is Python and the autograd
engine. The share of the peak is the operations of the matrix products a second, over those of one large product.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench_vs_trl import OURS, Work, build_trainer, choose_rows, load_model
from surroundings import surroundings

PARTS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "dequantisation": ("dequantize",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn_linear"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::_to_copy", "aten::index"),
    "exponentials and reductions": tuple(
        "softmax aten::exp aten::sum aten::amax aten::argmax aten::mean aten::max".split()
    ),
}
"""Parts by the beginnings or pieces of operators' names, the first that matches; others are elementwise."""


def part_of(name: str) -> str:
    """The part that an operator belongs to.

    >>> part_of("aten::addmm"), part_of("aten::mul")
    ('matrix products', 'elementwise')
    """
    return next((part for part, names in PARTS.items() if any(n in name for n in names)), "elementwise")


def peak_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Operations a second of a large matrix product, the best of five."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def one_step(trainer: Any, batch: dict[str, Any]) -> float:
    """Seconds of the forward and backward of a batch."""
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    start = time.perf_counter()
    trainer.training_step(trainer.model, batch, items)
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(work: Work, steps: int) -> dict[str, Any]:
    """The profile of some steps after one to warm up, beside their time without the profiler."""
    model = load_model(work)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(OURS, work, model, folder)
        trainer.train()  # the steps to warm up; prepares the model as a run does
        trainer.model.train()
        size = work.batch_size
        rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        batches = [trainer.data_collator(rows[i * size : (i + 1) * size]) for i in range(1, steps + 1)]
        plain = sum(one_step(trainer, batch) for batch in batches)
        cuda = trainer.args.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, with_flops=True) as found:
            profiled = sum(one_step(trainer, batch) for batch in batches)
    events = [event for event in found.key_averages() if event.self_device_time_total or event.self_cpu_time_total]
    own = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 for event in events}
    parts: Counter[str] = Counter()
    for name, seconds in own.items():
        parts[part_of(name)] += seconds
    products = sum(event.flops for event in events)
    rate = peak_rate(getattr(torch, work.dtype), trainer.args.device)
    return {
        "seconds_per_step": plain / steps,
        "profiled_seconds_per_step": profiled / steps,
        "unique_tokens": work.unique_tokens,
        "seconds": {name: value / steps for name, value in parts.most_common()},
        "not_in_operators": (profiled - sum(own.values())) / steps,
        "product_operations": products / steps,
        "peak_rate": rate,
        "share_of_peak_in_products": products / parts["matrix products"] / rate,
        "share_of_peak_in_step": products / profiled / rate,
        "operators": {name: value / steps for name, value in Counter(own).most_common(25)},
    }


def table(found: dict[str, Any]) -> str:
    """The parts as a Markdown table."""
    whole = found["profiled_seconds_per_step"]
    lines = ["| part | seconds a step | share |", "|---|---|---|"]
    parts = found["seconds"] | {"Python and autograd": found["not_in_operators"]}
    lines += [f"| {name} | {value:.2f} | {value / whole:.0%} |" for name, value in parts.items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Profile as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="JSON lines of pairs or groups")
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--checkpointing", default="on", choices=("on", "off"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=None, help="groups a step; 4 of pairs, 1 of lists")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--output", help="where to write JSON")
    args = parser.parse_args(words)
    fields, _ = choose_rows(args)
    work = Work(
        model=args.model,
        dtype=args.dtype,
        checkpointing=args.checkpointing == "on",
        max_length=args.max_length,
        learning_rate=1e-5,
        steps=0,
        **fields,
    )
    found = measure(work, args.steps)
    print(table(found))
    print(
        f"{found['seconds_per_step']:.2f} s a step without the profiler; matrix products run at "
        f"{found['share_of_peak_in_products']:.0%} of the peak ({found['peak_rate'] / 1e9:.0f} GFLOP/s)."
    )
    if args.output:
        Path(args.output).write_text(json.dumps(surroundings() | found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
