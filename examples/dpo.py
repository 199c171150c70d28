"""DPO of LoRA adapters on a 4-bit base, as a script.

    python examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

Takes a model from the Hub or a folder, and preference rows from the Hub or a local file.
"""

import argparse

from transformers import AutoTokenizer

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy
from qlora_dpo.files import load_rows


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description="DPO on a 4-bit base")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--test_split", default="test[:500]")
    parser.add_argument("--output_dir", default="dpo-output")
    parser.add_argument("--max_steps", type=int, default=-1)
    options = parser.parse_args()

    trainer = QLoRADPOTrainer(
        model=load_policy(options.model),
        args=QLoRADPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=5e-6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            report_to="none",
        ),
        train_dataset=load_rows(options.dataset, options.train_split),
        eval_dataset=load_rows(options.dataset, options.test_split),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    metrics = trainer.evaluate()
    print(f"accuracy {metrics['eval_rewards/accuracies']:.3f}, margin {metrics['eval_rewards/margins']:+.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
