"""What a step costs by its unique tokens, and by the completions of a prompt: both should be straight lines.

    python scripts/scaling.py --model DIR [--dtype float32] [--repeats 3] [--output FILE.json]

Times the forward and backward of policy and reference on groups of random tokens, the settings in turn and the whole
round repeated, and fits seconds = a + b x through the medians. `curvature` is how far the time at the largest x lies
from the line through the others, as a share of it: 0 is straight, above 0 grows faster.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import BitsAndBytesConfig

from qlora_dpo import load_policy
from qlora_dpo.forward import prepare_policy
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.objective import make_objective
from qlora_dpo.reference import BaseReference
from qlora_dpo.step import Step

from surroundings import surroundings

TOKENS = (512, 1024, 2048, 4096)
COMPLETIONS = (2, 4, 8, 16)


def group(prompt: int, completions: int, length: int, vocabulary: int, seed: int) -> Group:
    """A prompt and completions of random tokens, every completion paired with the first."""
    random = np.random.default_rng(seed)
    ids = [random.integers(10, vocabulary, size=length).tolist() for _ in range(completions)]
    pairs = [(0, i) for i in range(1, completions)]
    return Group(random.integers(10, vocabulary, size=prompt).tolist(), ids, pairs)


def seconds(step: Step, model: Any, groups: Sequence[Group], device: torch.device) -> tuple[float, int]:
    """Time of a forward and backward, and the tokens placed."""
    batch = send_to_device(make_batch(groups, "tree"), device)
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16):
        losses, _ = step.losses(model, batch)
    losses.mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, batch["num_unique_tokens"]


def line(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A straight line through all points but the last, and how far that one lies from it."""
    x, y = np.array(points).T
    slope, start = np.polyfit(x[:-1], y[:-1], 1)
    return {
        "points": [[float(a), float(b)] for a, b in points],
        "seconds_per_unit": float(slope),
        "curvature": float(y[-1] / (start + slope * x[-1]) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of a base model")
    parser.add_argument("--dtype", default="float32", help="dtype of weights and compute")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt in the curve over completions")
    parser.add_argument("--length", type=int, default=128, help="tokens of each completion in that curve")
    parser.add_argument("--output", help="file for the numbers as JSON")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    policy = load_policy(args.model, quantization_config=quantization, dtype=dtype)
    prepare_policy(policy)
    policy.train()
    device = policy.device
    vocabulary = policy.config.get_text_config().vocab_size
    step = Step(BaseReference(policy), make_objective(["sigmoid"], None, {"beta": 0.1}), 0.1)

    settings: dict[tuple[str, int], list[Group]] = {
        ("tokens", n): [group(64, 2, 96, vocabulary, seed) for seed in range(n // 256)] for n in TOKENS
    }
    settings |= {("completions", k): [group(args.prompt, k, args.length, vocabulary, 0)] for k in COMPLETIONS}
    times: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    placed = {}
    for repeat in range(args.repeats + 1):
        for setting, groups in settings.items():
            took, placed[setting] = seconds(step, policy, groups, device)
            if repeat:  # the first round warms up
                times[setting].append(took)
    medians = {setting: statistics.median(found) for setting, found in times.items()}
    result = surroundings() | {
        "tokens": line([(placed["tokens", n], medians["tokens", n]) for n in TOKENS]),
        "completions": line([(k, medians["completions", k]) for k in COMPLETIONS]),
        "prompt_tokens": args.prompt,
        "completion_tokens": args.length,
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    for name in ("tokens", "completions"):
        curve = result[name]
        print(f"{name:>12}  seconds")
        for x, y in curve["points"]:
            print(f"{x:12,.0f}  {y:.3f}")
        print(f"  {1000 * curve['seconds_per_unit']:.3f} ms each; the last is {curve['curvature']:+.1%} off the line")
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
