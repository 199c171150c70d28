"""Runs of a tiny policy, 4-bit base and all, that torchrun's two processes share by FSDP2, or one process makes alone.

accelerate shards models on accelerators only; here it is told that CPUs are some. PyTorch's FSDP2 runs on both.
As a script: `sharded_run.py FOLDER CASES.json` runs the cases and writes what rank 0 saw to FOLDER/seen.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy

from one_step import RANKED, KeepGradients
from tiny_chat import build_chat_tokenizer, build_tiny_llama

FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
    bnb_4bit_quant_storage=torch.float32,  # a dtype that FSDP2 can share out
)
SHARED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def share_on_cpus():
    """Let accelerate share a model over CPU processes as it does over GPUs."""
    plain = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def save_base(folder):
    tokenizer = build_chat_tokenizer()
    build_tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder, name, world, resume_from=None, **options):
    """Gradients, log lines and evaluations of a training, 4 groups a step over all processes."""
    torch.manual_seed(1)
    policy = load_policy(str(folder / "base"), quantization_config=FOUR_BIT, dtype=torch.float32)
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)  # away from its reference
    defaults = {
        "reference": "base", "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_length": None,
        "per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 2,
    }  # fmt: skip
    keep = KeepGradients()
    trainer = QLoRADPOTrainer(
        model=policy,
        args=QLoRADPOConfig(output_dir=str(folder / name), **(defaults | options | (SHARED if world > 1 else {}))),
        train_dataset=Dataset.from_list(RANKED),
        eval_dataset=Dataset.from_list(RANKED[:5]),
        processing_class=build_chat_tokenizer(),
        callbacks=[keep],
    )
    trainer.train(resume_from_checkpoint=resume_from and str(folder / name / resume_from))
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    history = trainer.state.log_history
    return {
        "gradients": keep.gradients,
        "log": [line for line in history if "loss" in line],
        "evaluations": [line for line in history if "eval_loss" in line],
        "shared": all(isinstance(w, DTensor) for w in (layer.base_layer.weight, layer.lora_A["default"].weight)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_on_cpus()
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    found = [run(folder, world=int(os.environ["WORLD_SIZE"]), **case) for case in cases]
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "seen.pt")
