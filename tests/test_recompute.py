"""Layers that keep their activations: the same gradient to the last bit, and as many recomputed layers as asked for."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy
from qlora_dpo.callbacks import KeepLayers
from qlora_dpo.cli import parse
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.recompute import decoder_layers

from one_step import RANKED, one_step
from test_trainer import trainer_of
from tiny_chat import build_tiny_llama, chat_row
from tiny_models import ARCHITECTURES, add_lora, build

GROUPS = [Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)])]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_tells_its_layers_apart(name):
    model = build(name)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers


def counted_gradient(policy, layers):
    """The gradient, and how often each layer began its work in the forward and in the backward pass."""
    calls = [0] * len(layers)

    def count(i):
        calls[i] += 1

    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda *_, i=i: count(i)) for i, layer in enumerate(layers)
    ]
    total = score_batch(policy, make_batch(GROUPS, "tree"))["logps"].sum()
    forward = list(calls)
    total.backward()
    for hook in hooks:
        hook.remove()
    grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return grads, forward, [after - before for after, before in zip(calls, forward, strict=True)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_only_the_other_layers_are_computed_again_and_the_gradient_is_the_same(tokenizer, kept, reentrant):
    model = build_tiny_llama(tokenizer)
    model.config.num_hidden_layers = 4
    model = type(model)(model.config)
    policy = add_lora(model).train()
    install_scoring(model)
    policy.enable_input_require_grads()
    layers = decoder_layers(model)
    whole, _, backward = counted_gradient(policy, layers)
    assert backward == [0, 0, 0, 0]
    enable = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for _ in range(2):  # idempotent
        KeepLayers(policy, kept).begin()
        found, forward, backward = counted_gradient(policy, layers)
        assert torch.equal(found, whole)
        assert (forward, backward) == ([1, 1, 1, 1], [int(i < 4 - kept) for i in range(4)])


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_forward": 60}, {"loss_type": "aot"}], ids=str)
def test_a_training_step_has_the_same_loss_and_gradient_for_every_number_of_layers(options):
    (expected,), log = one_step(**options)
    for kept in (1, 2, 7, "auto"):
        (found,), found_log = one_step(keep_layers=kept, **options)
        assert torch.equal(found, expected)
        assert found_log[0]["loss"] == log[0]["loss"]
    (found,), _ = one_step(gradient_checkpointing=False, **options)
    assert torch.equal(found, expected)


class Flags(TrainerCallback):
    """Which layers recompute, at every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append([layer.gradient_checkpointing for layer in decoder_layers(model.get_base_model())])


def test_layers_are_kept_in_every_training_and_after_an_evaluation(base_folder, make_args, chat_rows):
    """`Trainer` turns checkpointing on again whenever a training begins."""
    flags = Flags()
    trainer = QLoRADPOTrainer(
        model=load_policy(base_folder),
        args=make_args(max_steps=2, keep_layers="1", eval_strategy="steps", eval_steps=1),
        train_dataset=chat_rows,
        eval_dataset=chat_rows,
        callbacks=[flags],
    )
    trainer.evaluate()
    trainer.train()
    trainer.train()
    assert flags.seen == [[True, False]] * 4


def test_a_model_whose_layers_are_not_told_apart_is_refused(tokenizer, make_args, monkeypatch):
    model = build_tiny_llama(tokenizer)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.lm_head)
    with pytest.raises(ValueError, match="`keep_layers` must be 0 for LlamaForCausalLM"):
        QLoRADPOTrainer(
            model=add_lora(model),
            args=make_args(keep_layers=1),
            train_dataset=Dataset.from_list([chat_row(1), *RANKED[:0]]),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(("word", "value"), [("3", 3), ("auto", "auto"), ("0", 0)])
def test_the_command_line_takes_a_number_or_auto(tmp_path, word, value):
    (args,) = parse((QLoRADPOConfig,), ["--output_dir", str(tmp_path), "--keep_layers", word], "qlora-dpo train")
    assert args.keep_layers == value


def test_the_newer_name_of_checkpointing_counts_too(tmp_path):
    if not hasattr(QLoRADPOConfig, "activation_checkpointing"):
        pytest.skip("transformers of this version has the older name only")
    with pytest.raises(ValueError, match="`keep_layers` must be 0 without"):
        QLoRADPOConfig(output_dir=str(tmp_path), keep_layers=1, activation_checkpointing=False)


def test_checkpointing_that_is_switched_off_is_off(base_folder, tokenizer, make_args):
    """`load_policy` turns it on."""
    policy, seen = load_policy(base_folder), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.extend(bool(layer.gradient_checkpointing) for layer in decoder_layers(policy.get_base_model()))

    for wanted in (False, True):
        args = make_args(max_steps=1, gradient_checkpointing=wanted)
        trainer_of(tokenizer, args, policy=load_policy(base_folder) if wanted else policy, callbacks=[Look()]).train()
    assert seen == [False, False, False, False]
