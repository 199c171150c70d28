"""A trained adapter as a reward model: rank candidates, and keep the preference rows it is sure of.

    python examples/reward_scoring.py --adapter qwen-dpo --rows my_preferences.jsonl --min_margin 0.5

One 4-bit model in memory: rewards are beta (log pi - log pi_ref), the reference is what `qlora_dpo.json` beside the
adapter says.
"""

import argparse

from qlora_dpo import score_completions
from qlora_dpo.files import load_rows
from qlora_dpo.score import load_scorer


def main() -> None:
    """Score rows; print the ranking of each row of completions, count the pairs that are kept."""
    parser = argparse.ArgumentParser(description="Score completions with a DPO adapter")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", required=True, help="prompt, chosen, rejected; or prompt, completions")
    parser.add_argument("--min_margin", type=float, default=0.0)
    options = parser.parse_args()

    scorer = load_scorer(options.adapter)
    kept = total = 0
    for total, row in enumerate(score_completions(scorer, load_rows(options.rows)), start=1):
        if "error" in row:
            print(f"row {total}: {row['error']}")
        elif "margin" in row:
            kept += row["margin"] >= options.min_margin
        else:
            print(f"row {total}: best first {row['ranking']}, rewards {[round(r, 3) for r in row['rewards']]}")
    print(f"{kept} of {total} rows have a margin of at least {options.min_margin}")


if __name__ == "__main__":
    main()
