"""The reference: the base, bit for bit, and everything as it was afterwards."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from qlora_dpo.forward import install_scoring, noise_off, score_batch
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.reference import adapters_disabled, make_reference

from tiny_chat import build_tiny_llama

BATCH = make_batch([Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)])], "tree")


def policy_of(tokenizer, lora=None, **options):
    model = build_tiny_llama(tokenizer, **options)
    policy = get_peft_model(model, lora or LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    install_scoring(model)
    return policy.train()


def state_of(policy):
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    modes = {name: m.training for name, m in policy.named_modules()}
    off = {name: m.disable_adapters for name, m in policy.named_modules() if hasattr(m, "disable_adapters")}
    dropout = {name: m.attention_dropout for name, m in policy.named_modules() if hasattr(m, "attention_dropout")}
    return flags, modes, off, dropout


def test_reference_is_the_base_before_the_adapter_came(tokenizer):
    bare = build_tiny_llama(tokenizer)
    install_scoring(bare)
    with torch.no_grad():
        expected = score_batch(bare, BATCH)["logps"]
    policy = policy_of(tokenizer, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert torch.equal(make_reference("base", policy)(policy, BATCH), expected)
    with torch.no_grad():
        assert not torch.equal(score_batch(policy, BATCH)["logps"], expected)


def test_reference_scored_twice_is_bit_equal_in_spite_of_dropout_and_noise(tokenizer):
    from transformers.integrations.neftune import neftune_post_forward_hook

    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5)
    policy = policy_of(tokenizer, lora, attention_dropout=0.4)
    embedding = policy.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    with torch.no_grad():
        assert not torch.equal(score_batch(policy, BATCH)["logps"], score_batch(policy, BATCH)["logps"])
    reference = make_reference("base", policy)
    assert torch.equal(reference(policy, BATCH), reference(policy, BATCH))


def test_everything_is_as_before_after_the_reference_pass_and_after_an_error_in_it(tokenizer):
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5)
    policy = policy_of(tokenizer, lora, attention_dropout=0.4)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = state_of(policy)
    reference = make_reference("base", policy)
    reference(policy, BATCH)
    assert state_of(policy) == before
    with pytest.raises(IndexError):
        reference(policy, BATCH | {"predictors": torch.tensor([10**6] * 7)})
    assert state_of(policy) == before


def test_a_frozen_tensor_stays_frozen(tokenizer):
    """PEFT's own context manager makes every tensor of the adapter trainable again."""
    policy = policy_of(tokenizer)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    with adapters_disabled(policy):
        pass
    assert not frozen.requires_grad
    with policy.disable_adapter():
        pass
    assert frozen.requires_grad


def test_noise_off_keeps_layers_in_train_mode(tokenizer):
    policy = policy_of(tokenizer)
    with noise_off(policy):
        assert policy.training
        assert all(m.training for m in policy.modules() if type(m).__name__ == "LlamaDecoderLayer")


def test_no_reference_is_zero(tokenizer):
    reference = make_reference("none", policy_of(tokenizer))
    assert reference(None, BATCH).tolist() == [0.0, 0.0]


def test_an_adapter_that_is_trained_needs_a_named_reference(tokenizer):
    policy = policy_of(tokenizer, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(NotImplementedError, match="needs a fresh adapter"):
        make_reference("auto", policy)
    assert make_reference("base", policy).kind == "base"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused(tokenizer, start):
    policy = policy_of(tokenizer, LoraConfig(target_modules="all-linear", init_lora_weights=start))
    with pytest.raises(ValueError, match="must leave the base as it is"):
        make_reference("auto", policy)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], bias="all"), "`bias` must be 'none'"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "`modules_to_save` must be None"),
    ],
    ids=["bias", "modules_to_save"],
)
def test_adapters_that_train_the_base_are_refused(tokenizer, lora, message):
    with pytest.raises(ValueError, match=message):
        make_reference("auto", policy_of(tokenizer, lora))


def test_adapters_that_are_not_layers_on_tokens_are_refused(tokenizer):
    lora = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for kind in ("auto", "none"):
        with pytest.raises(NotImplementedError, match="act on each token"):
            make_reference(kind, policy_of(tokenizer, lora))


def test_base_weights_that_are_trainable_are_refused(tokenizer):
    policy = policy_of(tokenizer)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="Only adapter weights must be trainable"):
        make_reference("auto", policy)
