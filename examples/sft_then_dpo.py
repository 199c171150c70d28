"""An SFT adapter, then DPO of it and DPO on top of it, on one GPU and without a merge.

    python examples/sft_then_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset my_preferences.jsonl

The SFT adapter is trained by plain transformers and PEFT on the chosen completions. DPO then

- continues it: one adapter, compared with a frozen copy of its own start;
- or stacks a new adapter on it: the SFT adapter stays frozen, and is what the new one is compared with.

The trainer says at the start which reference it found, and that all margins are exactly 0 there.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.files import load_rows
from qlora_dpo.model import load_tokenizer


def train_sft(model: str, dataset: Dataset, folder: str, max_steps: int) -> None:
    """Likelihood of the chosen completions, by plain transformers; loss on their tokens alone."""
    tokenizer = load_tokenizer(model)
    groups, _ = prepare_dataset(dataset, tokenizer, TokenLimits(1024), name="sft")

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            prompt, chosen = row["prompt_ids"], row["completion_ids"][row["pairs"][0][0]]
            columns["input_ids"].append(torch.tensor(prompt + chosen))
            columns["labels"].append(torch.tensor([-100] * len(prompt) + chosen))
            columns["attention_mask"].append(torch.ones(len(prompt + chosen), dtype=torch.long))
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        return {name: pad_sequence(column, True, fill[name]) for name, column in columns.items()}

    args = TrainingArguments(
        folder,
        learning_rate=2e-4,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    policy = load_policy(model)
    Trainer(policy, args, data_collator=collate, train_dataset=groups).train()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_dpo(policy: PeftModel, dataset: Dataset, tokenizer_of: str, folder: str, max_steps: int) -> None:
    """DPO of whatever is trainable in the policy; the reference follows from what it is."""
    args = QLoRADPOConfig(
        output_dir=folder,
        learning_rate=5e-6,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
    )
    trainer = QLoRADPOTrainer(
        model=policy, args=args, train_dataset=dataset, processing_class=load_tokenizer(tokenizer_of)
    )
    trainer.train()
    trainer.save_model()


def main() -> None:
    """SFT, DPO continued, DPO stacked."""
    parser = argparse.ArgumentParser(description="SFT -> DPO without a merge")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output_dir", default="sft-then-dpo")
    parser.add_argument("--max_steps", type=int, default=-1)
    options = parser.parse_args()

    rows = load_rows(options.dataset, options.split)
    sft, continued, stacked = (f"{options.output_dir}/{name}" for name in ("sft", "dpo-continued", "dpo-stacked"))
    train_sft(options.model, rows, sft, options.max_steps)

    train_dpo(load_policy(options.model, adapter=sft), rows, options.model, continued, options.max_steps)

    new = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = load_policy(options.model, adapter=sft, peft_config=new)
    train_dpo(policy, rows, options.model, stacked, options.max_steps)
    print(f"adapters in {sft}, {continued} (replaces it) and {stacked} (goes on top of it)")


if __name__ == "__main__":
    main()
