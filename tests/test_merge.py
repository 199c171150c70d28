"""Merged models against the policy they were made from, whatever the adapter changes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import ModelCard
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_dpo import QLoRADPOConfig, load_policy, merge_adapter
from qlora_dpo.__main__ import main
from qlora_dpo.adapters import trained_adapters
from qlora_dpo.files import load_rows
from qlora_dpo.fold import BaseWeights, _policy_skeleton, _quantized_and_back, skeleton
from qlora_dpo.model import default_lora, load_base
from qlora_dpo.record import record_of, write_record
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
    policy.save_pretrained(folder, selected_adapters=trained_adapters(policy))
    build_chat_tokenizer().save_pretrained(folder)
    args = QLoRADPOConfig(output_dir=str(folder), bf16=False, report_to=[])
    write_record(str(folder), policy, record_of(policy, args, make_reference("none", policy)))
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


ROUNDING = 2e-5
"""Of fp32, on the scale of the logits."""


def error(found, expected):
    """Largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


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
OTHER_KINDS = {
    "ln tuning": ("llama", LNTuningConfig(target_modules=["input_layernorm"])),
    "ln tuning with biases": ("gpt2", LNTuningConfig(target_modules=["ln_1"])),
    "randlora": ("llama", RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "vera": ("llama", VeraConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "oft": ("llama", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
}
SIXTEEN_BIT_KINDS = OTHER_KINDS | {
    "loha": ("llama", LoHaConfig(r=4, target_modules=["q_proj"])),
    "lokr": ("llama", LoKrConfig(r=4, target_modules=["q_proj"])),
    "boft": ("llama", BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
    "hra": ("llama", HRAConfig(r=4, target_modules=["q_proj"])),
    "fourierft": ("llama", FourierFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "trainable tokens": ("llama", TrainableTokensConfig(token_indices=[4, 9], target_modules=["embed_tokens"])),
    "c3a": ("llama", C3AConfig(block_size=8, target_modules=["q_proj"])),
    "miss": ("llama", MissConfig(target_modules=["q_proj"])),
    "waveft": ("llama", WaveFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "gralora": ("llama", GraloraConfig(target_modules=["q_proj"])),
    "road": ("llama", RoadConfig(target_modules=["q_proj"])),
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
    assert error(logits(model), expected) <= ROUNDING
    assert report.untied == (kind in PARTED)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        base in ("tied", "gpt2") and not report.untied
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    if report.untied:  # transformers sees it in the weights, other programs read the config
        assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("kind", "quantize"), [(kind, False) for kind in SIXTEEN_BIT_KINDS] + [(kind, True) for kind in OTHER_KINDS]
)
def test_every_kind_that_is_merged_is_base_and_adapter(kind, quantize, bases, tmp_path):
    base, config = SIXTEEN_BIT_KINDS[kind]
    config.task_type = "CAUSAL_LM"
    options = {} if quantize else {"quantize": False, "quantization_config": None}
    policy, adapter = trained(bases[base], tmp_path / "adapter", config, **options)
    expected = logits(policy)
    with policy.disable_adapter():
        assert error(logits(policy), expected) > 0.003
    _, model = merged(adapter, tmp_path / "out")
    assert error(logits(model), expected) <= ROUNDING


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_a_base_whose_head_is_in_4_bit(targets, bases, tmp_path):
    """PEFT saves a head that has LoRA on it, packed, in the adapter's file."""
    policy, adapter = trained(bases["llama"], tmp_path / "adapter", lora(target_modules=targets), quantize_head=True)
    _, model = merged(adapter, tmp_path / "out")
    assert error(logits(model), logits(policy)) <= ROUNDING


def test_the_original_base_takes_the_adapter_too(bases, tmp_path):
    policy, adapter = trained(bases["llama"], tmp_path / "adapter", lora(use_rslora=True))
    report, model = merged(adapter, tmp_path / "out", into="original")
    assert report.into == "original"
    whole = load_policy(bases["llama"], adapter=adapter, quantize=False, dtype=torch.float32)
    assert error(logits(model), logits(whole.eval())) <= ROUNDING
    assert (logits(model) - logits(policy)).abs().max() > 0.01


STACKS = {
    "lora on lora": (lora(), lora(r=2, target_modules=["q_proj", "up_proj"])),
    "dora on lora": (lora(), lora(r=2, use_dora=True)),
    "lora on dora": (lora(use_dora=True), lora(r=2)),
    "tokens on lora": (lora(), lora(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "lora on a whole head": (lora(modules_to_save=["lm_head"]), lora(r=2)),
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacked_adapters_are_merged_together(kind, bases, tmp_path):
    below, above = STACKS[kind]
    _, sft = trained(bases["biased"], tmp_path / "sft", below)
    policy, adapter = trained(bases["biased"], tmp_path / "dpo", above, seed=1, adapter=sft)
    report, model = merged(adapter, tmp_path / "out")
    assert report.adapters == [sft, adapter]
    assert error(logits(model), logits(policy)) <= ROUNDING
    _, alone = merged(sft, tmp_path / "below")
    assert (logits(alone) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("quantization", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}])
def test_the_base_is_quantised_as_recorded(quantization, bases, tmp_path):
    policy, adapter = trained(
        bases["llama"], tmp_path / "adapter", lora(), quantization_config=four_bit(**quantization)
    )
    found = logits(merged(adapter, tmp_path / "out")[1])
    assert error(found, logits(policy)) <= ROUNDING
    default = load_policy(bases["llama"], adapter=adapter, quantization_config=four_bit(), dtype=torch.float32)
    assert error(found, logits(default.eval())) > 10 * ROUNDING  # a merge into another quantisation would be seen


def test_layers_that_were_left_out_of_the_quantisation_stay_as_they_are(bases, tmp_path):
    quantization = four_bit(llm_int8_skip_modules=["lm_head", "q_proj"])
    policy, adapter = trained(bases["llama"], tmp_path / "adapter", lora(), quantization_config=quantization)
    assert error(logits(merged(adapter, tmp_path / "out")[1]), logits(policy)) <= ROUNDING


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_base_that_is_in_4_bit_on_disk(base, bases, tmp_path):
    stored = load_base(bases[base], four_bit(), dtype=torch.float32)
    stored.save_pretrained(tmp_path / "base")
    build_chat_tokenizer().save_pretrained(tmp_path / "base")
    layers = LAYERS if base == "llama" else GPT2_LAYERS
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", lora(target_modules=layers))
    assert error(logits(merged(adapter, tmp_path / "out")[1]), logits(policy)) <= ROUNDING
    with pytest.raises(ValueError, match="`base` must be a 16-bit model for into='original'"):
        merge_adapter(adapter, str(tmp_path / "other"), into="original")
    report, model = merged(adapter, tmp_path / "other", into="original", base=bases[base])
    assert report.into == "original"
    assert (logits(model) - logits(policy)).abs().max() > 0.01


def test_a_base_that_was_not_quantised_is_the_original(bases, tmp_path):
    policy, adapter = trained(bases["llama"], tmp_path / "adapter", lora(), quantize=False, quantization_config=None)
    report, model = merged(adapter, tmp_path / "out")
    assert report.into == "original"
    assert error(logits(model), logits(policy)) <= ROUNDING


def test_unchanged_weights_are_those_that_training_multiplied_with(bases, tmp_path):
    """In bf16, as by default: to the last bit, and the tensors of the adapter's layers rounded once."""
    policy = moved(load_policy(bases["llama"], peft_config=lora(target_modules=["q_proj"]), dtype=torch.bfloat16))
    adapter = saved(policy, tmp_path / "adapter")
    merge_adapter(adapter, str(tmp_path / "out"))
    found = open_checkpoint(str(tmp_path / "out"))
    with torch.no_grad():
        for name, module in policy.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                weight = dequantized(module.base_layer).float() + module.get_delta_weight("default").float()
                assert torch.equal(found.tensor(f"{name}.weight"), weight.to(torch.bfloat16))
            elif hasattr(module, "compute_dtype") and "base_layer" not in name:
                assert torch.equal(found.tensor(f"{name}.weight"), dequantized(module))


def dequantized(layer):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """A plain LoRA over the Llama."""
    return trained(bases["llama"], tmp_path_factory.mktemp("adapter"), lora())[1]


def test_shards_are_full_and_no_larger_than_asked(adapter, tmp_path):
    one = merge_adapter(adapter, str(tmp_path / "one"), dtype="float32")
    many = merge_adapter(adapter, str(tmp_path / "many"), dtype="float32", max_shard_size="100KB")
    assert (one.shards, many.total_bytes) == (1, one.total_bytes)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) == many.shards > 2
    assert all(file.stat().st_size <= 100_000 for file in files)
    assert sum(file.stat().st_size for file in files) > 60_000 * len(files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - it is no dict
    assert index["metadata"]["total_size"] == many.total_bytes
    assert torch.equal(logits(plain(tmp_path / "one")), logits(plain(tmp_path / "many")))
    assert (tmp_path / "one" / "model.safetensors").stat().st_size > one.total_bytes


def test_tensors_of_odd_sizes_are_written_where_they_can_be_read(tmp_path):
    tensors = {"mask": torch.tensor([True, False, True]), "weight": torch.randn(3, 5), "empty": torch.zeros(0, 2)}
    tensors |= {"ids": torch.arange(7), "small": torch.randn(3).to(torch.bfloat16), "scalar": torch.tensor(2.5)}
    writer = ShardWriter(tmp_path, 10_000, list(tensors))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    found = open_checkpoint(str(tmp_path))
    assert set(found.names()) == set(tensors)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())
    assert all(found.tensor(name).dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_base_is_found_by_its_hub_id(bases, tmp_path, monkeypatch):
    """In the cache, with the network off."""
    cached = tmp_path / "cache" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(bases["llama"], cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    policy, adapter = trained("someone/tiny", tmp_path / "adapter", lora())
    report, model = merged(adapter, tmp_path / "out", sample_rows=CHAT_ROWS[:2])
    assert report.base == "someone/tiny"
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert error(logits(model), logits(policy)) <= ROUNDING
    _, named = merged(adapter, tmp_path / "named", base="someone/tiny@main", sample_rows=CHAT_ROWS[:2])
    assert error(logits(named), logits(policy)) <= ROUNDING


def test_a_sharded_base_is_read(tokenizer, tmp_path):
    build_tiny_llama(tokenizer).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("model-*"))) > 2
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", lora())
    assert error(logits(merged(adapter, tmp_path / "out")[1]), logits(policy)) <= ROUNDING


def test_tensors_whose_names_lack_the_prefix_are_found(bases, tmp_path):
    """As in GPT-2's files on the Hub, which are of the inner model."""
    plain(bases["gpt2"]).transformer.save_pretrained(tmp_path / "base")
    config = json.loads(Path(bases["gpt2"], "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    build_chat_tokenizer().save_pretrained(tmp_path / "base")
    assert "wte.weight" in open_checkpoint(str(tmp_path / "base")).names()
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", lora(target_modules=GPT2_LAYERS))
    assert error(logits(merged(adapter, tmp_path / "out")[1]), logits(policy)) <= ROUNDING


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_put_together_while_loading_are_carried_over(family, tokenizer, tmp_path):
    build_tiny(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    names = open_checkpoint(str(tmp_path / "base")).names()
    assert any("experts.0." in name for name in names)
    config = lora(target_modules=["q_proj", "v_proj", "o_proj"])
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", config)
    _, model = merged(adapter, tmp_path / "out")
    assert open_checkpoint(str(tmp_path / "out")).names() == names
    assert error(logits(model), logits(policy)) <= 1e-4


@pytest.mark.parametrize("into", ["quantized", "original"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_and_experts_that_the_default_lora_trains_are_merged(family, into, tokenizer, tmp_path):
    """PEFT makes "all-linear" of a mixture `target_parameters`; in the files each expert has tensors of its own."""
    build_tiny(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {} if into == "quantized" else {"quantize": False, "quantization_config": None}
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", default_lora(), **options)
    assert policy.peft_config["default"].target_parameters == {"gate.weight", "gate_up_proj", "down_proj"}
    report, model = merged(adapter, tmp_path / "out", into=into)
    assert error(logits(model), logits(policy)) <= ROUNDING
    assert report.layers == 2 * (4 + 2)
    names = open_checkpoint(str(tmp_path / "base")).names()
    assert open_checkpoint(str(tmp_path / "out")).names() == names


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_an_adapter_is_put_on_by_name(family, tokenizer, tmp_path):
    """Of gpt_oss they lie together in the files, turned round, and with biases that stay."""
    build_tiny(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    _, sft = trained(str(tmp_path / "base"), tmp_path / "sft", lora(**targets))
    policy, adapter = trained(str(tmp_path / "base"), tmp_path / "dpo", lora(r=2, **targets), seed=1, adapter=sft)
    _, model = merged(adapter, tmp_path / "out")
    assert error(logits(model), logits(policy)) <= ROUNDING


def test_experts_that_lie_in_the_files_in_another_way_are_refused(tokenizer, tmp_path, monkeypatch):
    build_tiny("mixtral").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    _, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", default_lora())
    part = BaseWeights.part
    monkeypatch.setattr(BaseWeights, "part", lambda self, key: part(self, key)[:1])
    with pytest.raises(NotImplementedError, match="Experts must lie in the files as transformers writes them, got"):
        merge_adapter(adapter, str(tmp_path / "out"))


def correction_bias(model):
    return next(buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))


@pytest.mark.parametrize("into", ["quantized", "original"])
def test_what_is_kept_in_fp32_is_not_rounded(into, tokenizer, tmp_path):
    """A router's correction bias: its third decimal decides which experts are chosen, and bf16 has two."""
    model = build_tiny("deepseek_v3")
    correction_bias(model).copy_(4 + 0.001 * torch.arange(4))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    _, adapter = trained(
        str(tmp_path / "base"), tmp_path / "adapter", lora(target_modules=["o_proj"]), dtype=torch.bfloat16
    )
    merge_adapter(adapter, str(tmp_path / "out"), into=into)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert found.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(correction_bias(found), correction_bias(model))


def test_everything_a_converter_needs_is_in_the_folder(bases, adapter, tmp_path):
    merge_adapter(adapter, str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == needed | {"chat_template.jinja", "merge.json", "README.md"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == build_chat_tokenizer().chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, IDS.shape[1] + 2)


def test_the_tokenizer_is_the_adapters_where_it_has_another_template(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora())
    tokenizer = build_chat_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    beside = ("tokenizer.model", "preprocessor_config.json")
    for name in beside:
        Path(bases["llama"], name).write_bytes(b"{}")
    merge_adapter(adapter, str(tmp_path / "out"))
    for name in beside:
        Path(bases["llama"], name).unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"
    assert [name for name in beside if not (tmp_path / "out" / name).is_file()] == []


@pytest.mark.parametrize("generation", [True, False], ids=["generation config", "none"])
def test_the_merged_model_ends_where_the_tokenizer_of_the_adapter_says(generation, bases, tmp_path):
    """The same tokens, another one of which ends an answer."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    if not generation:
        (base / "generation_config.json").unlink()
    _, adapter = trained(str(base), tmp_path / "adapter", lora())
    tokenizer = build_chat_tokenizer()
    assert tokenizer.eos_token != "<end>"
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(adapter)
    merge_adapter(adapter, str(tmp_path / "out"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.eos_token == "<end>"
    model = plain(tmp_path / "out")
    assert model.generation_config.eos_token_id == [found.convert_tokens_to_ids("<end>"), model.config.eos_token_id]


def test_every_file_that_serving_needs_is_carried_over(bases, tmp_path):
    """A second template (for tools, as Command R has one), another kind of vocabulary, and what reads images."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    names = ("vocab.txt", "spiece.model", "preprocessor_config.json", "processor_config.json")
    for name in names:
        (base / name).write_text("{}")
    _, adapter = trained(str(base), tmp_path / "adapter", lora())
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    merge_adapter(adapter, str(tmp_path / "out"))
    assert [name for name in names if not (tmp_path / "out" / name).is_file()] == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template["tool_use"] == "{{ tools }}"


def test_a_merge_that_was_cut_off_is_begun_again(adapter, tmp_path, monkeypatch):
    out, add, calls = tmp_path / "out", ShardWriter.add, []

    def stop(self, name, tensor):
        if len(calls) == 12:
            raise KeyboardInterrupt
        calls.append(name)
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, str(out), max_shard_size="20KB")
    assert {path.suffix for path in out.iterdir()} == {".part", ".unfinished"}
    with pytest.raises((OSError, ValueError)):
        plain(out)
    monkeypatch.setattr(ShardWriter, "add", add)
    merge_adapter(adapter, str(out))
    assert not [path for path in out.iterdir() if path.suffix in (".part", ".unfinished")]
    plain(out)
    with pytest.raises(ValueError, match=r"`output_dir` must be new or empty, got .*out"):
        merge_adapter(adapter, str(out))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"into": "gguf"}, "`into` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"max_shard_size": "big"}, "`max_shard_size` must be a size such as 2GB"),
        ({"base": "./nowhere"}, "The base model must be a folder or a Hub id"),
        ({"adapter": "./nowhere"}, "The adapter must be a folder or a Hub id"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message, adapter, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_adapter(**({"adapter": adapter, "output_dir": str(tmp_path / "out")} | options))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_refused(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir` must be a folder"):
        merge_adapter(adapter, str(tmp_path / "file"))
    with pytest.raises(ValueError, match="`output_dir` must be new or empty"):
        merge_adapter(adapter, str(tmp_path))


def with_config(adapter, folder, config):
    """The adapter's folder with another config of PEFT."""
    folder.mkdir()
    for path in Path(adapter).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config.base_model_name_or_path = "unused"
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "got PROMPT_TUNING"),
        (AdaLoraConfig(task_type="CAUSAL_LM", total_step=10), "got AdaLoRA"),
        (lora(init_lora_weights="pissa"), "must leave the base as it is, got init_lora_weights='pissa'"),
        (lora(layer_replication=[[0, 2], [0, 2]]), "`layer_replication` must be unset to merge, got"),
        (ShiraConfig(task_type="CAUSAL_LM", r=2), "must be of a kind whose merge is tested .LORA, .*, got SHIRA"),
    ],
)
def test_kinds_that_are_no_change_of_weights_are_refused(config, message, adapter, tmp_path):
    other = with_config(adapter, tmp_path / "other", config)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        merge_adapter(other, str(tmp_path / "out"))


def test_a_layer_with_adapters_of_two_kinds_is_refused(bases, tmp_path):
    """Tokens that are trained in embeddings are trained in a head that is tied to them."""
    config = lora(target_modules=["q_proj", "lm_head"], trainable_token_indices=[4, 9])
    _, adapter = trained(bases["tied"], tmp_path / "adapter", config)
    with pytest.raises(NotImplementedError, match=r"adapters of one kind to be merged, got lm_head\. Serve base"):
        merge_adapter(adapter, str(tmp_path / "out"))


def test_numbers_that_the_file_of_an_adapter_lacks_are_named(bases, tmp_path):
    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM")
    _, adapter = trained(bases["llama"], tmp_path / "adapter", config)
    with pytest.raises(
        NotImplementedError, match=r"compute with to be merged, got none for base_model\..*vera_A\. Load"
    ):
        merge_adapter(adapter, str(tmp_path / "out"))


@pytest.mark.parametrize("wrong", ["merge", "delta"])
def test_a_merge_that_is_not_what_the_layer_computes_is_noticed(wrong, bases, tmp_path, monkeypatch):
    """Whatever PEFT makes of an option that no test here knows."""
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora())
    if wrong == "merge":
        monkeypatch.setattr(LoraLinear, "merge", lambda *args, **kwargs: None)
    else:
        delta = LoraLinear.get_delta_weight
        monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 1.02 * delta(self, name))
    with pytest.raises(NotImplementedError, match=r"PEFT can merge, got model.* merged it is off by .*% of what"):
        merge_adapter(adapter, str(tmp_path / "out"))


def test_an_adapter_of_another_model_is_refused(bases, adapter, tmp_path):
    config = LlamaConfig.from_pretrained(bases["llama"], num_hidden_layers=3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match="must fit the model"):
        merge_adapter(adapter, str(tmp_path / "out"), base=str(tmp_path / "deeper"))
    with pytest.raises(ValueError, match="not found in the base model"):
        merge_adapter(adapter, str(tmp_path / "out"), base=bases["gpt2"])


def test_a_bias_without_a_place_is_refused(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora(lora_bias=True))
    with pytest.raises(NotImplementedError, match=r"that PEFT can merge, got model\.layers\.0\.mlp\.down_proj"):
        merge_adapter(adapter, str(tmp_path / "out"))


def test_a_layer_without_a_tensor_of_its_own_is_refused(bases, tmp_path, monkeypatch):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora())
    own = open_checkpoint(bases["llama"])
    lacking = dataclasses.replace(own, files={n: f for n, f in own.files.items() if "0.self_attn.q_proj" not in n})
    monkeypatch.setattr("qlora_dpo.merge.open_checkpoint", lambda *args: lacking)
    with pytest.raises(NotImplementedError, match="layer of the 4-bit base must have a tensor of its own"):
        merge_adapter(adapter, str(tmp_path / "out"))
    with pytest.raises(NotImplementedError, match="weight that the adapter changes must have a tensor of its own"):
        merge_adapter(adapter, str(tmp_path / "out"), into="original")


def test_a_base_without_safetensors_is_refused(bases, adapter, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(Path(bases["llama"], "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="must be in safetensors files, got none"):
        merge_adapter(adapter, str(tmp_path / "out"), base=str(tmp_path / "base"))


def test_a_base_of_another_quantisation_is_refused(bases, adapter, tmp_path):
    config = json.loads(Path(bases["llama"], "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(NotImplementedError, match="got gptq"):
        merge_adapter(adapter, str(tmp_path / "out"), base=str(tmp_path / "base"))


def test_an_8_bit_base_is_refused_with_the_way_out(adapter, tmp_path):
    other = with_config(adapter, tmp_path / "other", lora())
    record = json.loads(Path(other, "qlora_dpo.json").read_text())
    record["quantization"] |= {
        "load_in_4bit": False,
        "load_in_8bit": True,
        "_load_in_4bit": False,
        "_load_in_8bit": True,
    }
    Path(other, "qlora_dpo.json").write_text(json.dumps(record))
    with pytest.raises(NotImplementedError, match="got 8 bit\\. Use into='original'"):
        merge_adapter(other, str(tmp_path / "out"))
    merge_adapter(other, str(tmp_path / "out"), into="original")


def test_weights_too_large_for_fp16_are_refused(tokenizer, tmp_path):
    model = build_tiny_llama(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    _, adapter = trained(str(tmp_path / "base"), tmp_path / "adapter", lora())
    with pytest.raises(ValueError, match=r"which model\.norm\.weight does not fit"):
        merge_adapter(adapter, str(tmp_path / "out"), dtype="float16")


def test_options_of_sample_rows_are_refused_without_any(adapter, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`reference` must be None without `sample_rows`.*got base"):
        merge_adapter(adapter, str(tmp_path / "out"), reference="base")
    words = ["merge", "--adapter", adapter, "--output_dir", str(tmp_path / "out")]
    for option, value in {"num_rows": "4", "dataset_test_split": "test", "dataset_config": "x"}.items():
        assert main([*words, f"--{option}", value]) == 2
        assert f"`{option}` must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "found"), [("2GB", 2_000_000_000), ("1MiB", 2**20), (500, 500), ("1.5kb", 1500)])
def test_sizes(size, found):
    assert size_in_bytes(size) == found


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_by_the_adapter_and_one_layer(adapter, tokenizer, tmp_path):
    """On a base of 200 MB whose largest layer has 4 MB in fp32: counted in a process of its own.

    It gives back at once what it frees, or else what the C library keeps is counted too: 47 to 57 MB instead of 31.
    """
    options = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8}
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **options)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    record = json.loads(Path(adapter, "qlora_dpo.json").read_text())
    record |= {"base": str(tmp_path / "base"), "dtype": "bfloat16"}
    Path(tmp_path, "adapter", "qlora_dpo.json").write_text(json.dumps(record))
    words = [adapter, str(tmp_path / "adapter"), str(tmp_path / "out"), "50MB"]
    script = Path(__file__).with_name("one_merge.py")
    giving_back = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = [sys.executable, str(script), *words]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | giving_back)
    found = json.loads(done.stdout.splitlines()[-1])
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["written"] > 190e6
    assert found["taken"] < 2 * weights + 8 * 4 * 512 * 2048 < 0.2 * found["written"]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 5


# ---- what the merge changes ------------------------------------------------------------------------------------------


def naive_differences(adapter, folder, tokenizer, dtype, beta):
    """Policy against a merged model, a row and a side at a time, in plain forwards."""
    policy = load_policy(adapter, quantization_config=four_bit(), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens, completions, margins = [], [], []
    for row in CHAT_ROWS[:5]:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        margin = {"before": 0.0, "after": 0.0}
        for sign, side in ((1, "chosen"), (-1, "rejected")):
            whole = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=False)
            with torch.no_grad():
                before = completion_token_logps(policy, ids, whole[len(ids) :])
                after = completion_token_logps(model, ids, whole[len(ids) :])
                with policy.disable_adapter():
                    reference = completion_token_logps(policy, ids, whole[len(ids) :]).sum()
            tokens.append((after - before).abs())
            completions.append((after.sum() - before.sum()).abs())
            margin["before"] += sign * beta * float(before.sum() - reference)
            margin["after"] += sign * beta * float(after.sum() - reference)
        margins.append(margin)
    tokens = torch.cat(tokens)
    expected = {
        "token_mean": tokens.mean(),
        "token_max": tokens.max(),
        "completion_mean": torch.stack(completions).mean(),
        "completion_max": torch.stack(completions).max(),
        "margin": sum(margin["after"] for margin in margins) / 5,
        "accuracy": sum(margin["after"] > 0 for margin in margins) / 5,
    }
    before = [margin["before"] for margin in margins]
    return expected, sum(before) / 5, sum(margin > 0 for margin in before) / 5


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A training of two steps in fp32, and its rows."""
    folder = tmp_path_factory.mktemp("run")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    words = train_words(bases["llama"], str(rows), folder / "out")
    assert main([*words, "--dtype", "float32", "--bf16", "false", "--learning_rate", "1e-2", "--beta", "0.5"]) == 0
    return str(folder / "out"), str(rows)


@pytest.mark.parametrize(("into", "dtype"), [("quantized", "bfloat16"), ("original", "float32")])
def test_the_differences_are_those_of_plain_forwards(into, dtype, run, tokenizer, tmp_path):
    adapter, rows = run
    sample = load_rows(rows).select(range(5))
    report = merge_adapter(adapter, str(tmp_path / "out"), into=into, dtype=dtype, sample_rows=sample)
    other = "original" if into == "quantized" else "quantized"
    merge_adapter(adapter, str(tmp_path / "other"), into=other, dtype=dtype)
    assert list(report.differences) == ["quantized", "original"]
    for choice, folder in ((into, "out"), (other, "other")):
        expected, margin, accuracy = naive_differences(
            adapter, tmp_path / folder, tokenizer, getattr(torch, dtype), beta=0.5
        )
        for name, value in expected.items():
            tolerance = {"rel": 0.02, "abs": 0.01} if dtype == "bfloat16" else {"rel": 1e-3, "abs": 2e-5}
            assert getattr(report.differences[choice], name) == pytest.approx(float(value), **tolerance), name
        assert (report.pairs, report.accuracy) == (5, accuracy)
        assert report.margin == pytest.approx(margin, rel=1e-4)
    assert report.differences["quantized"].token_max < report.differences["original"].token_max
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == report.to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_a_merged_model_has_a_card_of_its_own(run, tmp_path):
    """What it is made of, how to load it, and what was measured, as the Hub reads it."""
    adapter, _ = run
    folder = Path(shutil.copytree(adapter, tmp_path / "my-adapter"))
    record = json.loads((folder / "qlora_dpo.json").read_text())
    record["datasets"]["train"]["id"] = "org/rows"
    (folder / "qlora_dpo.json").write_text(json.dumps(record | {"licence": {"license": "apache-2.0"}}))
    report = merge_adapter(str(folder), str(tmp_path / "my-merged"), sample_rows=CHAT_ROWS[:4])
    card = ModelCard.load(tmp_path / "my-merged" / "README.md")
    data, found = card.data, report.differences["quantized"]
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.datasets, data.base_model) == (["org/rows"], None)  # a folder is no id
    assert {"dpo", "qlora-dpo", "sigmoid"} <= set(data.tags)
    for words in (
        f"{Path(record['base']).name} with the adapter my-adapter merged into it: one model, in bfloat16",
        "quantised in training, dequantised", "from_pretrained('my-merged', dtype=\"auto\")", "8 groups, 8 pairs",
        f"| merged into the quantized base, this model | {found.token_mean:.4f} | {found.token_max:.4f} |",
        "| merged into the original base |", "That of the base model: apache-2.0.",
    ):  # fmt: skip
        assert words in card.text, words
    assert str(tmp_path) not in str(card)
    (source,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(source.replace("my-merged", str(tmp_path / "my-merged")), {})  # it is the card's own
    assert str(ModelCard(str(card))) == str(card)


def test_a_merge_that_was_not_measured_says_so_in_its_card(bases, adapter, tmp_path):
    record = json.loads(Path(adapter, "qlora_dpo.json").read_text()) | {"base": "org/base", "base_revision": None}
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    (moved / "qlora_dpo.json").write_text(json.dumps(record))
    merge_adapter(str(moved), str(tmp_path / "out"), base=bases["llama"], into="original")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "as trained was not measured" in text
    assert "The base was taken as it is stored." in text
    assert "org/base" not in text  # another one was taken


def test_in_fp32_the_4_bit_base_takes_the_adapter_without_a_difference(run, tmp_path):
    adapter, _ = run
    report = merge_adapter(adapter, str(tmp_path / "out"), dtype="float32", sample_rows=CHAT_ROWS[:4])
    assert report.differences["quantized"].token_max < 1e-4
    assert report.differences["quantized"].margin == pytest.approx(report.margin, abs=1e-4)
    assert report.differences["original"].token_mean > 0.01


def test_merging_from_the_command_line(run, tmp_path, capsys):
    adapter, rows = run
    words = ["merge", "--adapter", adapter, "--dataset_name", rows, "--num_rows", "3"]
    assert main([*words, "--output_dir", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "merged into the quantized base: 14 layers" in shown
    assert "on 3 pairs" in shown
    assert shown.index("into quantized (here)") < shown.index("into original ")
    assert main([*words, "--output_dir", str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["original"]["token_mean"] > found["differences"]["quantized"]["token_mean"] > 0
    assert main(["merge", "--adapter", adapter, "--output_dir", str(tmp_path / "c"), "--into", "original"]) == 0
    shown = capsys.readouterr().out
    assert "merged into the original base" in shown
    assert "no difference was measured: give a few preference rows with --dataset_name" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_rows", "0"], "`num_rows` must be 1 or more"),
        (["--into", "gguf"], "`into` must be one of"),
        (["--output_dir", "."], "`output_dir` must be new or empty"),
        (["--dataset_name", "./no.jsonl"], "Check the path"),
        (["--adapter", "."], "must lie beside its qlora_dpo.json"),
    ],
)
def test_mistakes_on_the_command_line(words, message, run, tmp_path, capsys):
    options = {"--adapter": run[0], "--output_dir": str(tmp_path / "out"), words[0]: words[1]}
    assert main(["merge", *(word for option in options.items() for word in option)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reference_that_was_in_memory_only_is_asked_for_before_anything_is_written(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    record = json.loads(Path(adapter, "qlora_dpo.json").read_text()) | {"reference": "initial"}
    Path(adapter, "qlora_dpo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="Name it, or another, with --reference"):
        merge_adapter(adapter, str(tmp_path / "out"), sample_rows=CHAT_ROWS[:2])
    assert not (tmp_path / "out").exists()
    report = merge_adapter(adapter, str(tmp_path / "out"), sample_rows=CHAT_ROWS[:2], reference="none")
    assert report.pairs == 2


def test_what_was_not_trained_in_4_bit_has_one_difference(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora(), quantize=False, quantization_config=None)
    report = merge_adapter(adapter, str(tmp_path / "out"), dtype="float32", sample_rows=CHAT_ROWS[:2])
    assert list(report.differences) == ["original"]
    assert report.differences["original"].token_max < 1e-4


def test_a_base_that_has_moved_is_measured_where_it_is(bases, tmp_path):
    (tmp_path / "there").mkdir()
    for path in Path(bases["llama"]).iterdir():
        (tmp_path / "there" / path.name).write_bytes(path.read_bytes())
    _, adapter = trained(str(tmp_path / "there"), tmp_path / "adapter", lora())
    (tmp_path / "there").rename(tmp_path / "here")
    options = {"dtype": "float32", "sample_rows": CHAT_ROWS[:2], "base": str(tmp_path / "here")}
    report = merge_adapter(adapter, str(tmp_path / "out"), **options)
    assert report.differences["quantized"].token_max < 1e-4


def test_a_pytorch_built_for_a_device_that_is_not_there_quantises_on_the_cpu(monkeypatch):
    """PyTorch's usual build is for CUDA, and names it as its accelerator also where there is none."""
    there = torch.accelerator.current_accelerator(check_available=True)

    def built_for_cuda(check_available=False):
        return there if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    weight, layer = torch.randn(64, 64), Linear4bit(64, 64, bias=False, device="meta")
    assert (_quantized_and_back(weight, layer) - weight).abs().max() < weight.abs().max() / 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_buffers_of_a_module_that_is_saved_whole_are_the_bases(name, tmp_path, tokenizer):
    """Gemma scales its embeddings by a buffer that no file holds."""
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    build_tiny(name).save_pretrained(folder)
    policy = load_policy(str(folder), peft_config=lora(modules_to_save=["embed_tokens"]), quantize=False)
    with torch.no_grad():
        policy.get_input_embeddings().modules_to_save["default"].weight.mul_(1.1)
    policy.save_pretrained(adapter)
    loaded = _policy_skeleton(skeleton(policy.config), [str(adapter)]).get_input_embeddings()
    assert torch.equal(loaded.modules_to_save["folded_0"].weight, policy.get_input_embeddings().weight.float())


def test_a_base_in_another_quantisation_is_refused(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "adapter", lora())
    shutil.copytree(bases["llama"], tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(NotImplementedError, match=r"must be in 16 bit or in .*, got gptq in .*gptq. Name the 16-bit"):
        merge_adapter(adapter, str(tmp_path / "out"), base=str(tmp_path / "gptq"))
