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
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.model import load_policy
from qlora_dpo.trainer import QLoRADPOTrainer
from qlora_dpo.world import SAMPLE_PROMPTS, make_preferences, save_base, true_reward

TRAIN_ROWS = 1280
HELDOUT_ROWS = 240
BATCH = 16
LEARNING_RATE = 1e-3
BETA = 0.5
RANDOM_ADAPTERS = 6
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


class _Lines(TrainerCallback):
    """One line per log in place of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Print a training log."""
        if logs and "rewards/margins" in logs:
            print(
                f"   step {state.global_step:2} of {state.max_steps}: loss {logs['loss']:.3f}, "
                f"accuracy {logs['rewards/accuracies']:.2f}, margin {logs['rewards/margins']:+.2f}",
                flush=True,
            )


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
        disable_tqdm=True,
        report_to=[],
        seed=arguments.seed,
    )
    set_seed(arguments.seed)  # the adapter's A matrices are random
    trainer = QLoRADPOTrainer(
        model=load_policy(base, gradient_checkpointing=False),
        args=args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(heldout_rows),
        callbacks=[_Lines()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _untrained_control(trainer: QLoRADPOTrainer, seed: int) -> dict[str, float]:
    """What accuracy means without training: the mean evaluation of some adapters of random weights.

    One random adapter may lean to either side by a tenth; their mean does not. The adapter is put back to zero.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    found: list[dict[str, float]] = []
    with torch.no_grad():
        for _ in range(RANDOM_ADAPTERS):
            for factor in factors:
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.02)  # drawn alike on every device
            found.append(trainer.evaluate())
        for factor in factors:
            factor.zero_()
    return {key: sum(metrics[key] for metrics in found) / len(found) for key in found[0]}


def run_demo(arguments: DemoArguments) -> dict[str, Any]:
    """Run the demo.

    Args:
        arguments: Where to write and how long to train.

    Returns:
        `before` and `after`: the evaluation's keys on held-out prompts; `control`: their mean over adapters of
        random weights; `true_reward`: its mean over samples before
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
        control = _untrained_control(trainer, arguments.seed)
        samples_before = _samples(trainer.model, trainer.processing_class, prompts, arguments.seed)
    with _phase("DPO", seconds):
        trainer.train()
    with _phase("evaluating after", seconds):
        after = trainer.evaluate()
        samples_after = _samples(trainer.model, trainer.processing_class, prompts, arguments.seed)
    trainer.save_model()
    _show(prompts[:SHOWN], samples_before, samples_after)
    rewards = {"before": _mean_reward(samples_before), "after": _mean_reward(samples_after)}
    _print_summary(before, control, after, rewards)
    print(f"adapter saved in {arguments.output_dir}; {sum(seconds.values()):.0f} s in all")
    both = zip(prompts, samples_before, samples_after, strict=True)
    return {
        "before": before,
        "control": control,
        "after": after,
        "true_reward": rewards,
        "samples": [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in both],
        "seconds": seconds,
    }


def _print_summary(
    before: dict[str, float], control: dict[str, float], after: dict[str, float], rewards: dict[str, float]
) -> None:
    """Accuracy, margin and true reward before and after."""
    print("\non prompts that occur in no training text:")
    for name, metrics in (("before", before), ("random adapters", control), ("after DPO", after)):
        accuracy, margin = metrics["eval_rewards/accuracies"], metrics["eval_rewards/margins"]
        print(f"  {name:16} preference accuracy {accuracy:.2f}, implicit reward margin {margin:+.2f}")
    print("  (an adapter that adds nothing ties every pair, and a tie counts one half)")
    print(f"  mean true reward of samples: {rewards['before']:+.1f} before, {rewards['after']:+.1f} after")
