"""What `auto` means: the plan's own numbers on a card, nothing on a CPU."""

import pytest
import torch
from datasets import Dataset

from qlora_dpo import QLoRADPOTrainer, load_policy, room
from qlora_dpo.memory import GIB
from qlora_dpo.room import budget_for, card_memory, kept_layers_for, plan_for

from test_trainer import policy_of
from tiny_chat import CHAT_ROWS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A card of so many bytes, whatever is there."""

    def set_to(size):
        monkeypatch.setattr(room, "card_memory", lambda device: size)

    return set_to


def test_a_cpu_has_no_limit(tokenizer, make_args):
    args = make_args(max_tokens_per_forward="auto", keep_layers="auto")
    assert card_memory(CPU) is None
    assert budget_for(policy_of(tokenizer), args, CPU) is None
    assert kept_layers_for(policy_of(tokenizer), args, CPU, 100) == 0


def test_numbers_are_taken_as_they_are(tokenizer, make_args, card):
    card(GIB)
    args = make_args(max_tokens_per_forward="77", keep_layers="1")
    assert budget_for(policy_of(tokenizer), args, CUDA) == 77
    assert kept_layers_for(policy_of(tokenizer), args, CUDA, 100) == 1
    assert budget_for(policy_of(tokenizer), make_args(), CUDA) is None


@pytest.mark.parametrize("quantize", [True, False])
def test_auto_fills_the_card_and_no_more(base_folder, make_args, card, quantize):
    policy = load_policy(base_folder, quantize=quantize)
    args = make_args(max_tokens_per_forward="auto", keep_layers="auto")
    size = GIB + 2**27
    card(size)
    tokens = budget_for(policy, args, CUDA)
    plan = plan_for(policy, args, size, tokens)
    assert plan.options.quantize == quantize
    assert plan.fits
    assert not plan.changed(tokens=tokens + 1).fits
    layers = len(policy.get_base_model().model.layers)
    kept = [kept_layers_for(policy, args, CUDA, n) for n in (tokens // 8, tokens // 2, tokens)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == layers
    assert plan.changed(tokens=tokens // 2, keep_layers=kept[1]).fits


def test_a_model_that_fills_the_card_is_refused_with_its_plan(base_folder, make_args, card):
    card(GIB)
    with pytest.raises(RuntimeError, match="must leave room to train on the card"):
        budget_for(load_policy(base_folder), make_args(max_tokens_per_forward="auto"), CUDA)


def test_a_trainer_with_auto_is_the_same_run(tokenizer, make_args):
    losses = []
    for options in ({}, {"max_tokens_per_forward": "auto", "keep_layers": "auto"}):
        trainer = QLoRADPOTrainer(
            policy_of(tokenizer),
            args=make_args(max_steps=2, **options),
            train_dataset=Dataset.from_list(CHAT_ROWS),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]


def test_other_words_are_refused(make_args):
    with pytest.raises(ValueError, match="must be a number, None or 'auto', got 'most'"):
        make_args(max_tokens_per_forward="most")
