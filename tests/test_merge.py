"""Merged models against the policy they were made from, whatever the adapter changes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qlora_dpo import QLoRADPOConfig, load_policy, merge_adapter
from qlora_dpo.cli import main
from qlora_dpo.data import load_rows
from qlora_dpo.model import load_base
from qlora_dpo.record import write_record
from qlora_dpo.reference import make_reference
from qlora_dpo.shards import ShardWriter, open_checkpoint, size_in_bytes

from reference_impl import completion_token_logps
from test_cli import train_words
from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama
from tiny_models import build as build_tiny

LAYERS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
GPT2_LAYERS = ["c_attn", "c_proj", "c_fc"]


def four_bit(**options):
    """The default quantisation, computed in fp32 so that only the merge can differ."""
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **(defaults | options))


def build_gpt2(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


BASES = {
    "llama": lambda tokenizer: build_tiny_llama(tokenizer),
    "biased": lambda tokenizer: build_tiny_llama(tokenizer, attention_bias=True, mlp_bias=True),
    "tied": lambda tokenizer: build_tiny_llama(tokenizer, tie_word_embeddings=True),
    "gpt2": build_gpt2,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """Folders of tiny bases, by name."""
    found = {}
    for name, make in BASES.items():
        folder = tmp_path_factory.mktemp(name)
        make(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def lora(**options):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM"} | options))


def moved(policy, seed=0, size=0.05):
    """The policy with every trainable weight somewhere else, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def saved(policy, folder):
    """The policy's adapter in a folder, as the trainer saves it."""
    policy.save_pretrained(folder)
    build_chat_tokenizer().save_pretrained(folder)
    args = QLoRADPOConfig(output_dir=str(folder), bf16=False, report_to=[])
    write_record(str(folder), policy, args, make_reference("none", policy))
    return str(folder)


def trained(base, folder, config, seed=0, adapter=None, **options):
    """A policy in fp32 over 4 bit with a moved adapter, and the folder it is saved in."""
    options = {"quantization_config": four_bit(), "dtype": torch.float32, "gradient_checkpointing": False} | options
    policy = moved(load_policy(base, peft_config=config, adapter=adapter, **options), seed)
    return policy, saved(policy, folder)


IDS = torch.tensor([[1, 9, 12, 15, 11, 20, 8, 25, 14], [1, 28, 27, 8, 9, 10, 11, 12, 13]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def require_equal(found, expected, tolerance=2e-5):
    """Equal up to fp32 rounding, on the scale of the logits."""
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * scale


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def merged(adapter, folder, **options):
    report = merge_adapter(adapter, str(folder), **({"dtype": "float32"} | options))
    return report, plain(folder)


KINDS = {
    "lora": ("llama", lora()),
    "rslora": ("llama", lora(use_rslora=True)),
    "ranks by layer": ("llama", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 32})),
    "dora": ("llama", lora(use_dora=True)),
    "ia3": (
        "biased",
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ),
    "trained biases": ("biased", lora(bias="all")),
    "trained biases of its layers": ("biased", lora(bias="lora_only", target_modules=["q_proj", "up_proj"])),
    "lora with bias": ("biased", lora(lora_bias=True)),
    "head": ("llama", lora(target_modules=["q_proj", "lm_head"])),
    "whole head": ("llama", lora(modules_to_save=["lm_head"])),
    "whole layer": ("llama", lora(target_modules=["q_proj"], modules_to_save=["input_layernorm"])),
    "embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens"])),
    "dora of embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens"], use_dora=True)),
    "tokens": ("llama", lora(trainable_token_indices=[4, 9, 12])),
    "tied, untouched": ("tied", lora()),
    "tied, embeddings": ("tied", lora(target_modules=["q_proj", "embed_tokens"])),
    "tied, head": ("tied", lora(target_modules=["q_proj", "lm_head"])),
    "tied, whole embeddings": ("tied", lora(modules_to_save=["embed_tokens"])),
    "tied, whole head": ("tied", lora(modules_to_save=["lm_head"])),
    "tied, both as one": ("tied", lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "tied, tokens": ("tied", lora(trainable_token_indices=[4, 9, 12])),
    "gpt2": ("gpt2", lora(target_modules=GPT2_LAYERS)),
    "gpt2, dora": ("gpt2", lora(target_modules=GPT2_LAYERS, use_dora=True)),
    "gpt2, biases": ("gpt2", lora(target_modules=GPT2_LAYERS, bias="all")),
}
PARTED = {"tied, embeddings", "tied, head", "tied, whole embeddings", "tied, whole head"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_4_bit_base_and_adapter(kind, bases, tmp_path):
    base, config = KINDS[kind]
    policy, adapter = trained(bases[base], tmp_path / "adapter", config)
    expected = logits(policy)
    with policy.disable_adapter():
        assert (logits(policy) - expected).abs().max() > 0.01 * expected.abs().max()
    report, model = merged(adapter, tmp_path / "out")
    require_equal(logits(model), expected)
    assert report.untied == (kind in PARTED)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        base in ("tied", "gpt2") and not report.untied
    )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
