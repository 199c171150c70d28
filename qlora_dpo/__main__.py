"""The way into the command line, as `qlora-dpo` and as `python -m qlora_dpo`.

What needs no library is answered before any is imported, which takes seconds.
"""

import sys
from collections.abc import Sequence

from qlora_dpo import __version__

COMMANDS = {
    "demo": "See it work, without network or GPU, in under two minutes: `qlora-dpo demo`.",
    "train": "Train an adapter: `qlora-dpo train --model_name_or_path ... --dataset_name ... --output_dir ...`.",
    "evaluate": "Evaluate a saved adapter: `qlora-dpo evaluate --adapter DIR --dataset_name ...`.",
    "score": "Score completions with an adapter: `qlora-dpo score --adapter DIR --source in.jsonl --target out.jsonl`.",
    "report": "Draw a run as one HTML file: `qlora-dpo report RUN_DIR`.",
    "plan": "Say what fits on a card, before any download: `qlora-dpo plan --model llama-3.1-8b --gpu 24GB`.",
    "push": "Push a saved adapter to the Hub: `qlora-dpo push --adapter DIR --repo_id user/name`.",
    "merge": "Merge an adapter into a model to serve: `qlora-dpo merge --adapter DIR --output_dir OUT`.",
}


def _usage() -> str:
    lines = [f"  {name:9} {summary}" for name, summary in COMMANDS.items()]
    foot = "qlora-dpo COMMAND --help lists options. qlora-dpo --version says the version."
    return "\n".join(["usage: qlora-dpo COMMAND [options]", "", *lines, "", foot])


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    It is 0, 1 if some rows had no score, 2 for what the user can put right, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(f"qlora-dpo {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"A command must be one of {sorted(COMMANDS)}, got {words[0]}.\n{_usage()}", file=sys.stderr)
        return 2
    try:
        from qlora_dpo.cli import run

        return run(words[0], words[1:])
    except KeyboardInterrupt:
        print(f"\nqlora-dpo {words[0]}: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
