"""Runs a command of qlora-dpo on a GPU as if it were a smaller card, and says what the command took.

    python scripts/capped_run.py --gpu 8GB --output FILE.json -- \\
        train --config examples/recipes/8gb-llama-3.1-8b.yaml --model_name_or_path DIR --dataset_name FILE \\
        --output_dir RUN --max_steps 3

PyTorch gets what the smaller card would leave it beside CUDA's context, so loading the model is held to it too. The
JSON has the most that was allocated and reserved, and the run's log lines.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.__main__ import main as qlora_dpo
from qlora_dpo.memory import GIB, parse_bytes

from surroundings import surroundings

STATE_NAME = "trainer_state.json"


def share_of(card: int, total: int, context: int) -> float:
    """PyTorch's share of a GPU's memory that leaves the context its place on the smaller card.

    >>> share_of(card=8, total=100, context=1)
    0.07

    Raises:
        ValueError: If the card is not smaller, or has no room for more than the context.
    """
    if not context < card <= total:
        least, most, got = (f"{size / GIB:.2f}" for size in (context, total, card))
        raise ValueError(f"`--gpu` must lie between {least} and {most} GiB, got {got}.")
    return (card - context) / total


def log_of(words: Sequence[str]) -> list[dict[str, Any]] | None:
    """The log lines of a training, from its output folder; None without."""
    if "--output_dir" not in words:
        return None
    path = Path(words[words.index("--output_dir") + 1], STATE_NAME)
    return json.loads(path.read_text())["log_history"] if path.is_file() else None


def main(words: Sequence[str] | None = None) -> int:
    """Run the command under the cap; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="memory of the smaller card, such as 8GB")
    parser.add_argument("--output", help="where to write JSON")
    parser.add_argument("command", nargs="+", help="after --: a command of qlora-dpo")
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("there is no GPU whose memory could be capped")
    torch.zeros((), device="cuda")  # so that the context is there
    free, total = torch.cuda.mem_get_info()
    context, card = total - free - torch.cuda.memory_reserved(), parse_bytes(args.gpu)
    torch.cuda.set_per_process_memory_fraction(share_of(card, total, context))
    start, status = time.perf_counter(), None
    try:
        status = qlora_dpo(args.command)
    except torch.OutOfMemoryError as error:  # while the model is loaded
        print(error, file=sys.stderr)
    reserved = torch.cuda.max_memory_reserved()
    found = surroundings() | {
        "status": status,
        "card_bytes": card,
        "context_bytes": context,
        "max_allocated_bytes": torch.cuda.max_memory_allocated(),
        "max_reserved_bytes": reserved,
        "taken_bytes": context + reserved,
        "seconds": time.perf_counter() - start,
        "log": log_of(args.command) if status == 0 else None,
    }
    print(f"status {status}; {found['taken_bytes'] / GIB:.2f} of {card / GIB:.2f} GiB taken, context included")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")
    return 1 if status is None else status


if __name__ == "__main__":
    sys.exit(main())
