"""DPO on ranked completions: one prompt, K completions, every one of them computed once.

    python examples/ranked_completions.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset my_ranked.jsonl

Rows hold `prompt`, `completions` and `scores` (higher is better) or `ranks` (1 is best). Without `--dataset` the script
trains on the small set below.
"""

import argparse

from datasets import Dataset

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy
from qlora_dpo.files import load_rows
from qlora_dpo.model import load_tokenizer

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
        "completions": [
            [{"role": "assistant", "content": text}] for text in (f"{a + b}.", f"{a} + {b} = {a + b}", f"{a * b}.", "?")
        ],
        "scores": [3, 4, 1, 0],
    }
    for a in range(2, 6)
    for b in range(2, 6)
]


def main() -> None:
    """Train with the pairs that the scores make, or with whole rankings (`--loss_type plackett_luce`)."""
    parser = argparse.ArgumentParser(description="DPO on ranked completions")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset")
    parser.add_argument("--loss_type", default="sigmoid", help="sigmoid, or plackett_luce for whole rankings")
    parser.add_argument("--pair_strategy", default="all", help="all, best_vs_rest, best_vs_worst or adjacent")
    parser.add_argument("--output_dir", default="ranked-dpo")
    parser.add_argument("--max_steps", type=int, default=-1)
    options = parser.parse_args()

    trainer = QLoRADPOTrainer(
        model=load_policy(options.model),
        args=QLoRADPOConfig(
            output_dir=options.output_dir,
            loss_type=options.loss_type,
            pair_strategy=options.pair_strategy,
            learning_rate=5e-6,
            max_steps=options.max_steps,
            per_device_train_batch_size=2,  # prompts, each with all of its completions and pairs
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=load_rows(options.dataset) if options.dataset else Dataset.from_list(ROWS),
        processing_class=load_tokenizer(options.model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
