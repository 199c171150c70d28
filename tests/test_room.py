"""What `auto` means: the plan's own numbers, on a card and in CPU memory."""

import types
import warnings

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOTrainer, load_policy, room
from qlora_dpo.memory import GIB
from qlora_dpo.room import budget_for, card_memory, host_memory, kept_layers_for, plan_for

from test_trainer import policy_of
from tiny_chat import CHAT_ROWS
from tiny_models import add_lora, build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A card of so many bytes, whatever is there."""

    def set_to(size):
        monkeypatch.setattr(room, "card_memory", lambda device: size)

    return set_to


def test_a_cpu_limits_no_tokens(tokenizer, make_args):
    args = make_args(max_tokens_per_forward="auto")
    assert card_memory(CPU) is None
    assert budget_for(policy_of(tokenizer), args, CPU) is None


def test_a_card_has_what_is_free_and_what_is_mine_or_the_share_that_pytorch_is_held_to(monkeypatch):
    """10 GiB with 6 free and 2 held by this process's allocator; 1 GiB of context counts in every plan."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (6 * GIB, 10 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for share, gib in ((1.0, 8), (0.5, 5), (0.9, 8)):
        monkeypatch.setattr("torch._C._cuda_getMemoryFraction", lambda index, share=share: share, raising=False)
        for device in (CUDA, torch.device("cuda:0")):
            assert card_memory(device) == int(0.9 * (gib + 1) * GIB)


def test_layers_are_kept_in_half_of_the_free_memory_of_a_cpu(base_folder, make_args, monkeypatch):
    """A small model of many tokens: 0 bytes hold none of its layers, all that there is hold all."""
    policy, args = load_policy(base_folder), make_args(keep_layers="auto")
    layers = len(policy.get_base_model().model.layers)
    plan = plan_for(policy, args, GIB, 100_000, CPU)
    needs = [plan.changed(keep_layers=k).peak_bytes for k in range(layers + 1)]
    assert needs == sorted(needs)
    assert needs[1] < needs[-1]  # the last layer is at work when the peak is there, kept or not
    for size in needs:
        monkeypatch.setattr(room, "host_memory", lambda size=size: size)
        assert kept_layers_for(policy, args, CPU, 100_000) == max(k for k, need in enumerate(needs) if need <= size)
    monkeypatch.setattr(room, "host_memory", lambda: needs[0] - 1)
    assert kept_layers_for(policy, args, CPU, 100_000) == 0


def test_the_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    memory = types.SimpleNamespace(available=8 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    mine = psutil.Process().memory_info().rss
    monkeypatch.setattr(room, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(str(GIB))
    assert host_memory() == pytest.approx(mine + 4 * GIB, rel=0.01)
    (tmp_path / "memory.max").write_text(str(3 * GIB))
    assert host_memory() == pytest.approx(mine + GIB, rel=0.01)
    (tmp_path / "memory.max").unlink()
    assert host_memory() == pytest.approx(mine + 4 * GIB, rel=0.01)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": False}, {"keep_layers": 0}, {"keep_layers": None}], ids=str
)
def test_nothing_is_kept_where_nothing_is_asked_or_recomputed(tokenizer, make_args, options):
    args = make_args(**({"keep_layers": "auto"} | options))
    assert kept_layers_for(policy_of(tokenizer), args, CPU, 100) == 0


def test_a_model_without_a_plan_trains_and_the_reason_is_said_once(tokenizer, make_args, card):
    card(GIB)
    room._say_unplanned.cache_clear()
    policy = add_lora(build("mixtral"))
    args = make_args(max_tokens_per_forward="auto", keep_layers="auto")
    with pytest.warns(
        UserWarning,
        match=r"`auto` sets no token budget and keeps no.*Set `max_tokens_per_forward` if.*must be without experts",
    ):
        assert budget_for(policy, args, CUDA) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget_for(policy, args, CUDA) is None
        assert kept_layers_for(policy, args, CUDA, 100) == 0


def test_a_base_in_8_bit_has_no_plan(base_folder, make_args, card):
    card(GIB)
    policy = load_policy(base_folder)
    policy.get_base_model().is_loaded_in_8bit = True
    room._say_unplanned.cache_clear()
    with pytest.warns(UserWarning, match="must be in 4 or 16 bit to be planned, got one in 8 bit"):
        assert budget_for(policy, make_args(max_tokens_per_forward="auto"), CUDA) is None


@pytest.mark.parametrize("nested", [True, False])
def test_a_plan_counts_quantisation_constants_as_the_base_has_them(nested, base_folder, make_args):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    policy = load_policy(base_folder, quantization_config=quantization)
    assert plan_for(policy, make_args(), GIB, 100, CPU).options.use_bnb_nested_quant == nested


def test_an_error_that_no_plan_expects_is_not_swallowed(tokenizer, make_args, card, monkeypatch):
    def broken(*args, **options):
        raise KeyError("a bug")

    card(GIB)
    monkeypatch.setattr(room, "plan_memory", broken)
    with pytest.raises(KeyError, match="a bug"):
        budget_for(policy_of(tokenizer), make_args(max_tokens_per_forward="auto"), CUDA)


def test_numbers_are_taken_as_they_are(tokenizer, make_args, card):
    card(GIB)
    args = make_args(max_tokens_per_forward="77", keep_layers="1")
    assert budget_for(policy_of(tokenizer), args, CUDA) == 77
    assert kept_layers_for(policy_of(tokenizer), args, CUDA, 100) == 1
    assert budget_for(policy_of(tokenizer), make_args(max_tokens_per_forward=None), CUDA) is None


@pytest.mark.parametrize("quantize", [True, False])
def test_auto_fills_the_card_and_no_more(base_folder, make_args, card, quantize):
    policy = load_policy(base_folder, quantize=quantize)
    args = make_args(max_tokens_per_forward="auto", keep_layers="auto")
    size = GIB + 2**27
    card(size)
    tokens = budget_for(policy, args, CUDA)
    plan = plan_for(policy, args, size, tokens, CUDA)
    assert plan.options.quantize == quantize
    assert plan.fits
    assert not plan.changed(tokens=tokens + 1).fits
    layers = len(policy.get_base_model().model.layers)
    kept = [kept_layers_for(policy, args, CUDA, n) for n in (tokens // 8, tokens // 2, tokens)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == layers
    assert plan.changed(tokens=tokens // 2, keep_layers=kept[1]).fits


def test_a_model_that_fills_the_card_is_warned_of_with_its_plan(base_folder, make_args, card):
    card(GIB)
    with pytest.warns(UserWarning, match="the model leaves no room to train on the card"):
        assert budget_for(load_policy(base_folder), make_args(max_tokens_per_forward="auto"), CUDA) is None


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
        assert trainer.kept.count == len(trainer.kept.layers) * bool(options)
    assert losses[0] == losses[1]


def test_other_words_are_refused(make_args):
    with pytest.raises(ValueError, match="must be a number, None or 'auto', got 'most'"):
        make_args(max_tokens_per_forward="most")
