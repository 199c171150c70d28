"""`qlora-dpo demo`: from nothing to a preference-tuned 4-bit model in a few minutes on two CPU cores.

Trains a small base on the synthetic language of `world`, quantises it to NF4, runs DPO and shows accuracy and samples
before and after. Nothing is downloaded.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.model import load_policy
from qlora_dpo.trainer import QLoRADPOTrainer
from qlora_dpo.world import SAMPLE_PROMPTS, make_preferences, save_base, true_reward

TRAIN_ROWS = 1280
HELDOUT_ROWS = 240
BATCH = 16
LEARNING_RATE = 1e-3
BETA = 0.5
SHOWN = 4
"""Prompts whose samples are printed; `metrics.json` holds all."""


@dataclass
class DemoArguments:
    """Options of the demo."""

    output_dir: str = field(default="demo", metadata={"help": "Where base, adapter and metrics.json go."})
    max_steps: int = field(default=80, metadata={"help": "DPO steps."})
    base_steps: int = field(default=120, metadata={"help": "Steps of training the base."})
    seed: int = field(default=0, metadata={"help": "Seed of base, data and adapter."})


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say what is going on, and note how long it took."""
    print(f"== {name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _progress(step: int, loss: float) -> None:
    if step % 40 == 0:
        print(f"   step {step}: loss {loss:.3f}", flush=True)


def _samples(policy: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int) -> list[str]:
    """One sampled completion per prompt."""
    policy.eval()
    torch.manual_seed(seed)
    texts = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=policy.device)
            out = policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=0.7,
                max_new_tokens=48,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    policy.train()
    return texts


def _mean_reward(completions: list[str]) -> float:
    return sum(true_reward(text) for text in completions) / len(completions)


def _show(prompts: list[str], before: list[str], after: list[str]) -> None:
    """Samples side by side, one block a prompt, each with its true reward."""
    for prompt, old, new in zip(prompts, before, after, strict=False):
        print(f"\n  {prompt}")
        print(f"    before ({true_reward(old):+.0f})  {old}")
        print(f"    after  ({true_reward(new):+.0f})  {new}")


def _trainer(arguments: DemoArguments, base: str) -> QLoRADPOTrainer:
    """The policy on the 4-bit base, and the rows to train and to hold out."""
    train_rows, heldout_rows = make_preferences(TRAIN_ROWS, HELDOUT_ROWS, seed=arguments.seed)
    args = QLoRADPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.max_steps // 10,
        beta=BETA,
        logging_steps=max(1, arguments.max_steps // 6),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        seed=arguments.seed,
    )
    return QLoRADPOTrainer(
        model=load_policy(base, gradient_checkpointing=False),
        args=args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(heldout_rows),
    )


def run_demo(arguments: DemoArguments) -> dict[str, Any]:
    """Run the demo.

    Args:
        arguments: Where to write and how long to train.

    Returns:
        `before` and `after`: the evaluation's keys on held-out prompts; `true_reward`: its mean over samples before
        and after; `samples`; `seconds` by phase.
    """
    seconds: dict[str, float] = {}
    base = str(Path(arguments.output_dir, "base"))
    prompts = list(SAMPLE_PROMPTS)
    with _phase("training a small base model", seconds):
        save_base(base, steps=arguments.base_steps, seed=arguments.seed, progress=_progress)
    with _phase("quantising to NF4, evaluating before", seconds):
        trainer = _trainer(arguments, base)
        before = trainer.evaluate()
        samples_before = _samples(trainer.model, trainer.processing_class, prompts, arguments.seed)
    with _phase("DPO", seconds):
        trainer.train()
    with _phase("evaluating after", seconds):
        after = trainer.evaluate()
        samples_after = _samples(trainer.model, trainer.processing_class, prompts, arguments.seed)
    trainer.save_model()
    _show(prompts[:SHOWN], samples_before, samples_after)
    rewards = {"before": _mean_reward(samples_before), "after": _mean_reward(samples_after)}
    print(
        f"\npreference accuracy on held-out prompts: {before['eval_rewards/accuracies']:.2f} before, "
        f"{after['eval_rewards/accuracies']:.2f} after"
    )
    print(f"mean true reward of samples: {rewards['before']:+.2f} before, {rewards['after']:+.2f} after")
    print(f"adapter saved in {arguments.output_dir}; {sum(seconds.values()):.0f} s in all")
    samples = [
        {"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, samples_before, samples_after, strict=True)
    ]
    return {"before": before, "after": after, "true_reward": rewards, "samples": samples, "seconds": seconds}
