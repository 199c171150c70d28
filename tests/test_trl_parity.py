"""Against TRL 1.16 itself: same model, same LoRA start, same rows, fp32 (extra `bench`)."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.layouts import group_of

from tiny_chat import build_tiny_llama, chat_row

trl = pytest.importorskip("trl", reason="the extra `bench` is not installed")

STEPS = 5
TRL_KEYS = {
    "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy",
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
}  # fmt: skip


def policy(tokenizer):
    """The same policy at every call: seeded base, seeded LoRA."""
    model = build_tiny_llama(tokenizer)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def options(folder):
    return {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }


def log_of(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_every_log_key_of_trl_agrees_over_five_steps(tokenizer, tmp_path, loss_type, layout):
    rows = Dataset.from_list([chat_row(seed) for seed in range(20)])
    theirs = log_of(
        trl.DPOTrainer(
            model=policy(tokenizer),
            args=trl.DPOConfig(**options(tmp_path / "trl"), loss_type=[loss_type]),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    )
    from qlora_dpo import QLoRADPOConfig

    ours = log_of(
        QLoRADPOTrainer(
            model=policy(tokenizer),
            args=QLoRADPOConfig(**options(tmp_path / "ours"), loss_type=[loss_type], batch_layout=layout),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    )
    assert len(ours) == len(theirs) == STEPS
    assert set(theirs[0]) - {"step"} >= TRL_KEYS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for key in set(other) - {"step", "epoch"}:
            if key == "rewards/accuracies" and mine["rewards/ties"]:
                continue  # TRL counts a tie as wrong, this library as one half; all pairs tie before the first update
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (step, key)
    assert ours[0]["rewards/ties"] == 1
    assert ours[-1]["rewards/ties"] == 0


@pytest.mark.parametrize("max_length", [None, 12, 20])
def test_token_ids_are_those_of_trl(tokenizer, tmp_path, max_length):
    """Messages and text, prompts given and implied, with and without truncation."""
    messages = [chat_row(seed) for seed in range(8)]
    text = [{"prompt": "the cat", "chosen": " sees the dog", "rejected": " never finds a tree house today"}] * 2
    implied = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in messages]
    for rows in (messages, text, implied):
        dataset = Dataset.from_list(rows)
        trainer = trl.DPOTrainer(
            model=policy(tokenizer),
            args=trl.DPOConfig(**{**options(tmp_path), "max_length": max_length}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        expected = []
        for row in trainer.train_dataset:
            sides = [(row["prompt_ids"] + row[side])[:max_length] for side in ("chosen_ids", "rejected_ids")]
            if sides[0] != sides[1]:  # TRL trains on pairs that truncation made equal; this library drops them
                expected.append((row["prompt_ids"], sides))
        kept, _ = prepare_dataset(dataset, tokenizer, TokenLimits(max_length))
        found = []
        for row in kept:
            group = group_of(row)
            w, l = group.pairs[0]
            found.append((row["prompt_ids"], [row["prompt_ids"] + row["completion_ids"][i] for i in (w, l)]))
        assert found == expected
        assert found
