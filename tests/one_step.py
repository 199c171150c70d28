"""One optimizer step of a tiny policy, its gradient and log: for tests in one process, and in several by torchrun.

As a script: `one_step.py CASES.json OUT.pt` runs every case and saves what rank 0 saw.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer

from tiny_chat import build_chat_tokenizer, build_tiny_llama, ranked_row

RANKED = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4, 3, 6, 2, 5])]


class KeepGradients(TrainerCallback):
    """The gradient of every optimizer step, as the optimizer sees it."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad for p in model.parameters() if p.grad is not None]
        whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]
        self.gradients.append(torch.cat([grad.flatten() for grad in whole]))


def one_step(rows=RANKED, steps=1, columns=None, lora_dropout=0.0, **options):
    """Gradients and log lines of some optimizer steps of a policy in fp64 that is not at its reference."""
    tokenizer = build_chat_tokenizer()
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        lora_dropout=lora_dropout,
    )
    policy = get_peft_model(build_tiny_llama(tokenizer), lora).double()
    rows = [row | {name: values[i] for name, values in (columns or {}).items()} for i, row in enumerate(rows)]
    keep = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "reference": "base", "max_steps": steps, "max_grad_norm": 0.0, "learning_rate": 1e-3, "logging_steps": 1,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True,
            "max_length": None,
        }  # fmt: skip
        args = QLoRADPOConfig(output_dir=folder, **(defaults | options))
        trainer = QLoRADPOTrainer(
            model=policy,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[keep],
        )
        trainer.train()
    return keep.gradients, [line for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        rows = RANKED[: case.pop("groups", len(RANKED))]
        gradients, log = one_step(rows, **case)
        found.append({"gradients": gradients, "log": log, "world": torch.distributed.get_world_size()})
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[2])
