"""Loading: real 4-bit layers, fp32 adapters, and no change of arithmetic along the way."""

import json
import random
import re
import shutil
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from datasets import Dataset
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.adapters import frozen_adapters, is_fresh, trained_adapters
from qlora_dpo.arguments import policy_from, reference_from
from qlora_dpo.errors import FixableError, OutOfMemoryError
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.model import (
    attach_adapter,
    default_quantization,
    keep_one_arithmetic,
    load_base,
    load_tokenizer,
    load_trained,
)
from qlora_dpo.options import ModelArguments, chosen_policy
from qlora_dpo.paths import UNKNOWN

from test_trainer import trainer_of
from tiny_chat import CHAT_ROWS, build_tiny_llama
from tiny_models import build

GROUPS = [
    Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)]),
    Group([20, 9], [[10, 2], [15, 16, 17, 2], [9, 2]], [(1, 0), (1, 2)]),
]


def four_bit_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.fixture
def policy(base_folder):
    return load_policy(base_folder)


def gradient(policy, layout="tree", groups=None):
    policy.zero_grad()
    policy.train()
    score_batch(policy, make_batch(groups or GROUPS, layout))["logps"].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_base_is_nf4_with_double_quantisation_and_sixteen_bit_compute(policy):
    layers = four_bit_layers(policy)
    assert len(layers) == 2 * 7
    for layer in layers.values():
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype is torch.bfloat16
    base = policy.get_base_model()
    assert type(base.lm_head) is torch.nn.Linear
    sixteen_bit = {p.dtype for n, p in base.named_parameters() if "lora" not in n and p.is_floating_point()}
    assert sixteen_bit == {torch.bfloat16}
    assert not base.config.use_cache


def test_adapter_is_lora_of_rank_16_in_fp32_on_all_linear_layers_but_the_head(policy):
    adapted = [name for name, m in policy.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype is torch.float32 for name, p in trainable.items())
    assert all(p.shape[0] == 16 for n, p in trainable.items() if "lora_A" in n)
    assert is_fresh(policy)


SMALL = {
    "vocab_size": 29,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "config",
    [PhimoeConfig(**SMALL), Llama4TextConfig(intermediate_size_mlp=64, head_dim=16, **SMALL)],
    ids=["phimoe", "llama4"],
)
def test_routers_that_are_linear_layers_by_their_class_are_not_adapted(config, tmp_path):
    """They return a tuple, to which PEFT's LoRA cannot add."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), gradient_checkpointing=False)
    adapted = {name.rpartition(".")[2] for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    assert adapted >= {"q_proj", "o_proj"}
    assert "router" not in adapted
    install_scoring(policy.get_base_model())
    assert gradient(policy, "padded").norm() > 0


def test_a_kind_of_adapter_that_cannot_leave_layers_out_takes_all(tokenizer):
    policy = attach_adapter(build_tiny_llama(tokenizer), VeraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert trained_adapters(policy) == ["default"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_base_whose_experts_stay_in_16_bit_is_said(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"should have no stacked experts, got [\d.e-]+ of its [\d.e-]+ GB in such"):
        load_base(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_base(str(tmp_path), quantize=False)


def test_memory_that_runs_out_while_a_base_is_loaded_is_said_with_the_way_out(base_folder, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhausted)
    with pytest.raises(OutOfMemoryError, match=r"while the base was loaded, got: CUDA out of memory.*qlora-dpo plan"):
        load_policy(base_folder)


def test_checkpointing_works_with_frozen_embeddings(base_folder):
    def run(**options):
        torch.manual_seed(0)
        policy = load_policy(
            base_folder, peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False), **options
        )
        install_scoring(policy.get_base_model())
        return gradient(policy)

    kept, recomputed = run(gradient_checkpointing=False), run(gradient_checkpointing=True)
    assert kept.norm() > 0
    assert torch.equal(kept, recomputed)


def test_four_bit_layers_never_change_their_arithmetic(base_folder, monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes repacks a layer that runs in eval mode; the switch is off at load."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    policy = load_policy(base_folder)
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(policy).values())


def test_keep_one_arithmetic_mends_a_model_handed_in(base_folder, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=default_quantization())
    assert all(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model).values())
    keep_one_arithmetic(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model).values())


def test_a_model_that_has_generated_on_a_cpu_is_not_trained_on(base_folder, tokenizer, make_args, monkeypatch):
    """Its gradients would be others, without an error, at a start whose margins are exactly zero."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    quantization = default_quantization()
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=quantization, dtype=torch.bfloat16)
    for layer in four_bit_layers(model).values():  # as its first forward in eval mode does
        packed, layer.weight.quant_state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data = packed
    rows, config = Dataset.from_list(CHAT_ROWS), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    said = r"must not have run on a CPU in eval mode before it is handed in, got 14 layers .* Load it anew"
    with pytest.raises(FixableError, match=said):
        QLoRADPOTrainer(model, args=make_args(), train_dataset=rows, processing_class=tokenizer, peft_config=config)


def test_gradients_are_bit_equal_before_and_after_evaluation_and_generation(base_folder):
    policy = load_policy(base_folder, peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False))
    install_scoring(policy.get_base_model())
    before = gradient(policy)
    policy.eval()
    with torch.no_grad():
        score_batch(policy, make_batch(GROUPS, "tree"))
        policy.generate(input_ids=torch.tensor([[9, 10, 11]]), max_new_tokens=4, use_cache=True)
    assert torch.equal(gradient(policy), before)


def long_groups(seed):
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(8, 29) for _ in range(length)]

    return [Group(ids(12), [ids(40), ids(25)], [(0, 1)]), Group(ids(3), [ids(9), ids(30), ids(20)], [(0, 1)])]


def scores_and_gradients(policy):
    """By layout, of several batches: log-probabilities, and the gradients of their sums, in fp64."""
    found = {}
    for layout in LAYOUTS:
        gradients = [gradient(policy, layout, long_groups(seed)) for seed in range(8)]
        with torch.no_grad():
            logps = [score_batch(policy, make_batch(long_groups(seed), layout))["logps"] for seed in range(8)]
        found[layout] = torch.cat(logps).double(), torch.cat(gradients).double()
    return found


def test_layouts_agree_on_a_four_bit_base(base_folder):
    """With products in fp32 to 5e-5 nats of about -90; in bf16 each is as far from that as one sequence at a time is.

    Over these batches bf16 is 0.03 nats off in any layout, and 1.1 % of the gradient. A plain causal mask over the
    tree's row is off by 3.4 to 3.8 nats.
    """
    torch.manual_seed(0)
    policy = load_policy(base_folder, peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False))
    install_scoring(policy.get_base_model())
    rounded = scores_and_gradients(policy)
    policy.float()
    for layer in four_bit_layers(policy).values():
        layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    found = scores_and_gradients(policy)
    logps, grad = found["padded"]
    for layout in ("tree", "packed"):
        assert (found[layout][0] - logps).abs().max() < 5e-5
        assert (found[layout][1] - grad).norm() < 2e-6 * grad.norm()
        for mine, padded, truth in zip(rounded[layout], rounded["padded"], found["padded"], strict=True):
            assert 0 < (mine - truth).norm() < 1.1 * (padded - truth).norm()


def test_a_saved_adapter_loads_with_the_base_it_names(policy, tmp_path, base_folder):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    policy.save_pretrained(tmp_path)
    again = load_policy(str(tmp_path))
    assert isinstance(again, PeftModel)
    assert not is_fresh(again)
    for (name, one), (_, other) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(p.requires_grad for p in again.parameters())


def test_a_new_adapter_is_stacked_on_a_trained_one_which_is_frozen(base_folder, policy, tmp_path):
    policy.save_pretrained(tmp_path)
    stacked = load_policy(base_folder, adapter=str(tmp_path), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert (trained_adapters(stacked), frozen_adapters(stacked)) == (["default"], ["below"])
    assert {p.dtype for p in stacked.parameters() if p.requires_grad} == {torch.float32}
    assert stacked.adapter_sources == {"below": str(tmp_path)}


@pytest.mark.parametrize("path", ["./nowhere", "/not/there/at/all"])
def test_a_model_path_that_is_not_there_is_refused(path):
    with pytest.raises(FileNotFoundError, match="Check the path"):
        load_policy(path)
    with pytest.raises(FileNotFoundError, match="Check the path"):
        load_tokenizer(path)


def test_adapters_on_a_sixteen_bit_base_are_fp32_too(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    policy = attach_adapter(model)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (NF4, None),
        (None, "not quantised, to go on exactly, got in 4 bit .nf4, double.*Set `quantize`"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "in 4 bit .fp4, double., to go on"),
        (NF4 | {"bnb_4bit_use_double_quant": False}, "in 4 bit .nf4., to go on"),
        (NF4 | {"llm_int8_skip_modules": []}, "head too., to go on"),
        ({"load_in_8bit": True}, "in 8 bit, to go on"),
    ],
    ids=str,
)
def test_an_adapter_of_a_base_in_other_bits_is_warned_of(policy, base_folder, tmp_path, then, said):
    policy.save_pretrained(tmp_path)
    (tmp_path / "qlora_dpo.json").write_text(json.dumps({"quantization": then}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_policy(base_folder, adapter=str(tmp_path))
    found = [str(w.message) for w in caught if "as it was trained" in str(w.message)]
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=lambda more: next(iter(more)))
def test_all_that_is_trained_is_in_fp32_when_it_goes_on(tokenizer, tmp_path, more):
    build_tiny_llama(tokenizer, attention_bias=True).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    policy = load_policy(str(tmp_path / "base"), peft_config=config)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)  # numbers that bf16 does not have
    policy.save_pretrained(tmp_path / "adapter")
    again = load_policy(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    found = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trained[name]), name


def test_an_adapter_of_another_name_is_found_in_its_sub_folder(base_folder, tokenizer, make_args):
    args = make_args()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(load_base(base_folder), lora, adapter_name="mine")
    trainer_of(tokenizer, args, policy=policy).save_model()
    assert Path(args.output_dir, "mine", "adapter_config.json").is_file()
    assert load_policy(args.output_dir).peft_config["default"].r == 2


def test_a_stack_is_found_from_another_folder(base_folder, tokenizer, make_args, tmp_path, monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    monkeypatch.chdir(tmp_path)
    load_policy(base_folder, peft_config=lora).save_pretrained("sft")
    policy = load_policy(base_folder, adapter="sft", peft_config=lora)
    trainer_of(tokenizer, make_args(output_dir="dpo"), policy=policy).save_model()
    monkeypatch.chdir("/")
    assert len(load_policy(str(tmp_path / "dpo")).active_adapters) == 2


def test_a_folder_without_a_tokenizer_is_named(base_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(base_folder, name), tmp_path)
    with pytest.raises(FileNotFoundError, match=f"The folder {tmp_path} must hold a tokenizer, got none of its files"):
        load_tokenizer(str(tmp_path))


def test_a_run_on_the_cpu_loads_its_models_there_though_there_is_a_gpu(base_folder, tmp_path, make_args, monkeypatch):
    args = make_args(use_cpu=True, reference=base_folder)
    adapter = str(tmp_path / "adapter")
    load_policy(base_folder).save_pretrained(adapter)
    with monkeypatch.context() as patched:
        patched.setattr("torch.accelerator.is_available", lambda: True)
        policies = [policy_from(base_folder, args, None, None), policy_from(adapter, args, None, None)]
        policies.append(chosen_policy(ModelArguments(model_name_or_path=base_folder), args))
        reference = reference_from(policies[0], None, args)
    assert {policy.device.type for policy in (*policies, reference.model)} == {"cpu"}


def test_a_run_on_the_cpu_loads_bf16_though_the_gpu_would_have_fp16(base_folder, make_args, monkeypatch):
    args = make_args(use_cpu=True, reference=base_folder)
    monkeypatch.setattr("qlora_dpo.model.best_precision", lambda: "fp16")
    policies = [policy_from(base_folder, args, None, None)]
    policies.append(chosen_policy(ModelArguments(model_name_or_path=base_folder), args))
    for model in (*policies, reference_from(policies[0], None, args).model):
        assert model.dtype is torch.bfloat16
        computed = {module.compute_dtype for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert computed == {torch.bfloat16}


def test_a_quantisation_that_is_not_wanted_is_refused(base_folder):
    with pytest.raises(ValueError, match="`quantize` must be True with a `quantization_config`"):
        load_policy(base_folder, quantize=False, quantization_config=default_quantization())


def test_an_adapter_that_transformers_loaded_is_refused(base_folder):
    model = load_base(base_folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"must have no adapter yet, got one that transformers loaded. Load the base"):
        attach_adapter(model)


def test_an_adapter_on_one_that_was_in_memory_only_is_refused(policy, base_folder, tmp_path):
    policy.save_pretrained(tmp_path)
    (tmp_path / "qlora_dpo.json").write_text(json.dumps({"stacked_on": UNKNOWN}))
    with pytest.raises(ValueError, match=r"must name the one .*, got one that was in memory only. Save that one, and"):
        load_policy(base_folder, adapter=str(tmp_path))


def test_a_checkpoint_without_weights_is_named(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"weights in adapter_model.safetensors, got none in {tmp_path}. Check"):
        load_trained(policy, str(tmp_path))
