"""Hard cases of `auto` and of memory that runs out. A docstring, or a name, says what went wrong."""

import types
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback, Zamba2Config

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, forward, load_policy, room
from qlora_dpo.callbacks import KeepLayers
from qlora_dpo.cli import parse
from qlora_dpo.memory import GIB
from qlora_dpo.recompute import checkpoint_activations, decoder_layers
from qlora_dpo.room import budget_for, host_memory, kept_layers_for, plan_for, spare_host_memory

from test_trainer import policy_of
from tiny_chat import CHAT_ROWS, build_tiny_llama, ranked_row
from tiny_models import add_lora, build

CPU = torch.device("cpu")
ROWS = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4, 3, 6, 2, 5])]


def trainer_of(tokenizer, args, policy=None, rows=CHAT_ROWS, **options):
    return QLoRADPOTrainer(
        model=policy or policy_of(tokenizer),
        args=args,
        train_dataset=None if rows is None else Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )


def recomputing(tokenizer):
    model = build_tiny_llama(tokenizer)
    checkpoint_activations(model)
    return model


def tied(tokenizer):
    config = build_tiny_llama(tokenizer).config
    config.tie_word_embeddings = True
    return add_lora(LlamaForCausalLM(config))


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt", "gemma3"])
def test_families_with_tied_embeddings_keep_every_layer_of_a_small_model(make_args, name):
    """On a CPU their embeddings were taken for moved there, which tied ones cannot be: an error."""
    policy = add_lora(build(name))
    layers = policy.config.get_text_config().num_hidden_layers
    assert kept_layers_for(policy, make_args(keep_layers="auto"), CPU, 100) == layers


def test_a_model_with_tied_embeddings_trains_on_a_cpu_by_default(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1, keep_layers="auto"), tied(tokenizer))
    trainer.train()
    assert (trainer.state.global_step, trainer.kept.count) == (1, len(trainer.kept.layers))


def test_a_family_without_attention_has_no_plan_and_no_error(make_args, monkeypatch):
    monkeypatch.setattr(room, "card_memory", lambda device: GIB)
    policy = add_lora(build("mamba"))
    assert budget_for(policy, make_args(), CPU) is None
    assert kept_layers_for(policy, make_args(keep_layers="auto"), CPU, 100) == 0


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_model_of_ones_own_class_trains_by_default(tokenizer, make_args):
    own = OwnModel(
        OwnConfig(**{k: v for k, v in build_tiny_llama(tokenizer).config.to_dict().items() if k != "model_type"})
    )
    trainer = trainer_of(tokenizer, make_args(max_steps=1, keep_layers="auto"), add_lora(own))
    trainer.train()
    assert (trainer.state.global_step, trainer.kept.count) == (1, 0)


@pytest.mark.parametrize("budget", [None, 25])
def test_log_after_fewer_kept_layers(tokenizer, make_args, monkeypatch, budget):
    """A group in parts: the second stage runs out of memory once, with layers kept."""
    options = {"max_steps": 1, "max_length": None, "max_tokens_per_forward": budget, "keep_layers": 2}
    whole = trainer_of(tokenizer, make_args(**options), rows=ROWS)
    whole.train()
    trainer = trainer_of(tokenizer, make_args(**options), rows=ROWS)
    trainer._prove()
    trainer.model.train()
    trainer._check_start()
    real, refused = forward._score_part, []

    def limited(model, part, *args):
        if torch.is_grad_enabled() and trainer.kept.count:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, part, *args)

    monkeypatch.setattr(forward, "_score_part", limited)
    with pytest.warns(UserWarning, match="fewer layers kept"):
        trainer.train()
    assert refused
    lines = [t.state.log_history[0] for t in (whole, trainer)]
    for key, value in lines[0].items():
        if not key.endswith(("per_second", "gib")):
            assert lines[1].get(key) == pytest.approx(value, rel=1e-5), key


def test_each_time_fewer_are_kept(tokenizer):
    kept = KeepLayers(recomputing(tokenizer), 1000)
    kept.begin()
    before = sum(not layer.gradient_checkpointing for layer in kept.layers)
    assert kept.keep_fewer()
    assert sum(not layer.gradient_checkpointing for layer in kept.layers) < before


def test_processes_share_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=8 * GIB))
    monkeypatch.setattr(room, "CONTAINER", tmp_path)
    alone = host_memory()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory() < alone - 2 * GIB


def test_embeddings_are_held_on_a_cpu(tokenizer, make_args):
    plan = plan_for(policy_of(tokenizer), make_args(), GIB, 10, CPU)
    assert "embeddings" in plan.held


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_reference_model_takes_room(tokenizer, make_args, monkeypatch, with_reference):
    """No memory is free; what is taken is the plan with one kept layer (which is free), and the reference model."""
    other = build_tiny_llama(tokenizer) if with_reference else None
    policy = policy_of(tokenizer)
    trainer = trainer_of(tokenizer, make_args(max_steps=1, keep_layers="auto"), policy, ref_model=other)
    monkeypatch.setattr(trainer, "_longest_batch", lambda: 1000)
    plan = plan_for(policy, trainer.args, GIB, 1000, CPU)
    size = plan.changed(keep_layers=1).peak_bytes
    added = plan.changed(keep_layers=2).peak_bytes - size
    assert added > 0
    size += max(added, sum(p.numel() * p.element_size() for p in other.parameters())) if other else 0
    monkeypatch.setattr(room, "host_memory", lambda: size)
    trainer.train()
    assert trainer.kept.count == 1


def test_cpu_memory_is_not_that_of_another_device(tokenizer, make_args):
    assert kept_layers_for(policy_of(tokenizer), make_args(keep_layers="auto"), torch.device("xpu"), 10) == 0


@pytest.mark.parametrize("word", ["None", "none", "null"])
def test_the_command_line_can_say_none(tmp_path, word):
    words = ["--output_dir", str(tmp_path), "--max_tokens_per_forward", word]
    assert parse((QLoRADPOConfig,), words, "qlora-dpo train")[0].max_tokens_per_forward is None


def test_every_n_layers_stays(tokenizer, make_args):
    seen = []

    class Flags(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append([layer.gradient_checkpointing for layer in trainer.kept.layers])

    config = build_tiny_llama(tokenizer).config
    config.num_hidden_layers = 4
    options = {"gradient_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": False}}
    args = make_args(max_steps=1, keep_layers=1, **options)
    trainer = trainer_of(tokenizer, args, add_lora(LlamaForCausalLM(config)), callbacks=[Flags()])
    trainer.train()
    assert seen == [[True, False, True, False]]
    args.keep_layers = "auto"
    assert kept_layers_for(trainer.model, args, CPU, 100) == 0


def test_containers_of_the_older_kind(monkeypatch, tmp_path):
    """Half of the 2 GiB that are left there, whatever this process has."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(room, "CONTAINER", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(4 * GIB))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(str(2 * GIB))
    assert spare_host_memory() == GIB


def test_an_evaluation_is_not_warned_of_training(base_folder, tokenizer, make_args, monkeypatch):
    monkeypatch.setattr(room, "card_memory", lambda device: GIB)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no room to train")
        rows, policy = Dataset.from_list(CHAT_ROWS), load_policy(base_folder)
        trainer = QLoRADPOTrainer(model=policy, args=make_args(), eval_dataset=rows)
        assert trainer.data_collator.max_tokens is None
        with pytest.raises(UserWarning, match="no room to train"):
            QLoRADPOTrainer(model=policy, args=make_args(), train_dataset=rows)


def test_tokens_of_an_earlier_training_stay_counted(tokenizer, make_args, monkeypatch):
    """On a GPU a second training tries the longest batch before its first step."""
    trainer = trainer_of(tokenizer, make_args(max_steps=2))
    trainer.train()
    seen = trainer.state.num_input_tokens_seen

    def full(model, part, *args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(forward, "_score_part", full)
    with pytest.raises(RuntimeError, match="Memory ran out"):
        trainer._try_longest()
    assert trainer.state.num_input_tokens_seen == seen


def test_layers_within_layers_are_not_counted_twice():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Zamba2Config())
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
