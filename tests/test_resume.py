"""A run that is stopped goes on as if it had not been: to the last bit, from the last whole checkpoint, or not at all."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.checkpoints import MANIFEST_NAME, checkpoint_to_resume, damage, rotate, write_manifest
from qlora_dpo.cli import main
from qlora_dpo.generations import GENERATIONS_NAME
from qlora_dpo.resuming import groups_fingerprint

from test_cli import train_words
from test_trainer import RANKED, policy_of, trainer_of, weights
from tiny_chat import CHAT_ROWS

NF4_IN_FP32 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NOISY = {"lora_dropout": 0.2, **LORA}
SPEED = ("_per_second", "runtime", "peak_memory_gib")
GIVEN = [row | {"ref_logps": [-3.0 * i - n for n in range(2)]} for i, row in enumerate(CHAT_ROWS)]


def curve(trainer):
    """All that a log shows but for speed and the line that sums up a call of `train`."""
    lines = [line for line in trainer.state.log_history if "train_loss" not in line]
    return [{key: value for key, value in line.items() if not key.endswith(SPEED)} for line in lines]


def random_states():
    name, numbers, *rest = np.random.get_state()
    return [random.getstate(), (name, numbers.tolist(), *rest), torch.get_rng_state().tolist()]


def outcome(trainer):
    """What must be the same whether or not a run was stopped."""
    state = trainer.state
    return curve(trainer), state.best_metric, state.best_global_step, weights(trainer).tolist(), random_states()


def disturb():
    """Random numbers as those of a new process: others."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.fixture(scope="module")
def sft(base_folder, tokenizer, tmp_path_factory):
    """A folder with an adapter that adds something."""
    folder = tmp_path_factory.mktemp("sft")
    policy = load_policy(base_folder, peft_config=LoraConfig(**LORA), quantize=False, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    policy.save_pretrained(folder)
    return str(folder)


# ---- to the last bit -----------------------------------------------------------------------------------------------

MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_max_rank": 8}
CASES = {
    "base": {"reference": "base"},
    "initial": {"adapter": True, "kind": "initial"},
    "stacked on a frozen adapter": {"adapter": True, "peft_config": LoraConfig(**NOISY), "kind": "adapter"},
    "path of an adapter": {"reference": "SFT", "kind": "adapter"},
    "precomputed": {"precompute_ref_log_probs": True},
    "given": {"rows": GIVEN},
    "average, moved before the checkpoint": MOVING | {"kind": "average"},
    "average, moved after it": MOVING | {"ref_model_sync_steps": 4, "kind": "average"},
    "average of a continued adapter": MOVING | {"adapter": True, "kind": "average"},
    "bco_running_mean": {"loss_type": "bco_pair", "bco_running_mean": True, "gradient_accumulation_steps": 2},
    "coupled pairs in two micro-batches": {"loss_type": "aot", "gradient_accumulation_steps": 2},
    "a group beyond the token budget": {"rows": RANKED, "max_tokens_per_forward": 20},
    "no reference": {"loss_type": "simpo", "kind": "none"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_goes_on_to_the_last_bit(case, base_folder, sft, tokenizer, make_args, tmp_path):
    """In the middle of an epoch and of a log line's pairs, on an NF4 base, with dropout, evaluations and answers."""
    case = {"rows": CHAT_ROWS[:8], "adapter": None, "kind": "base", "peft_config": None} | case
    rows, adapter, kind, stacked = (case.pop(name) for name in ("rows", "adapter", "kind", "peft_config"))
    case["reference"] = case.get("reference", "auto").replace("SFT", sft)
    options = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1,
        "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "disable_dropout": False,
        "sample_generations": 1, "sample_generations_every": 2, "sample_max_new_tokens": 3,
        "metric_for_best_model": "eval_loss", "warmup_steps": 2,
    }  # fmt: skip
    if case.get("precompute_ref_log_probs"):
        case["reference_cache"] = str(tmp_path / "cache.sqlite")
    if case.get("gradient_accumulation_steps"):
        options["per_device_train_batch_size"] = 1

    def run(name, resume=None):
        torch.manual_seed(1)
        policy = load_policy(
            base_folder,
            adapter=sft if adapter else None,
            peft_config=stacked if adapter else LoraConfig(**NOISY),
            quantization_config=NF4_IN_FP32,
            dtype=torch.float32,
        )
        for module in policy.modules():  # an adapter from a folder has its own, none
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.update({name: torch.nn.Dropout(0.2) for name in module.lora_dropout})
        trainer = QLoRADPOTrainer(
            model=policy,
            args=make_args(output_dir=str(tmp_path / name), **(options | case)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(CHAT_ROWS[8:]),
            processing_class=tokenizer,
        )
        if resume:
            disturb()
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("a")
    expected = outcome(whole)
    assert whole.reference.kind == kind
    assert len({line["loss"] for line in expected[0] if "loss" in line}) > 1
    again = run("b", str(tmp_path / "a" / "checkpoint-3"))
    for one, other in zip(expected[0], curve(again), strict=True):
        assert one == other
    assert outcome(again) == expected
    lines = [[json.loads(line) for line in (tmp_path / n / GENERATIONS_NAME).read_text().splitlines()] for n in "ab"]
    assert [line["step"] for line in lines[0]] == [1, 3, 5]
    assert lines[1] == lines[0][2:]
