"""Reference log-probabilities on disk: hit by everything that leaves them as they are, missed by what does not."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.cache import LogpsCache

from tiny_chat import CHAT_ROWS, build_chat_tokenizer, build_tiny_llama, chat_row

ROWS = [chat_row(seed) for seed in range(6)]
SIDES = 2 * len(ROWS)


@pytest.fixture
def run(tokenizer, make_args, tmp_path):
    """Train a step or two over a cache that all runs of a test share; returns the trainer."""

    def train(rows=ROWS, policy=None, rank=4, tokenizer=tokenizer, eval_rows=None, **options):
        options = {"max_steps": 1, "per_device_train_batch_size": 2} | options
        args = make_args(precompute_ref_log_probs=True, reference_cache=str(tmp_path / "cache.sqlite"), **options)
        if policy is None:
            torch.manual_seed(args.seed)
            policy = build_tiny_llama(tokenizer)
            policy = get_peft_model(policy, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer = QLoRADPOTrainer(
            model=policy,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    return train


def test_all_values_are_there_before_the_first_step_and_evaluation_sets_too(run):
    trainer = run(eval_rows=CHAT_ROWS[8:])
    assert trainer.reference.misses == SIDES + 8
    trainer.evaluate()
    assert trainer.reference.misses == SIDES + 8


def test_precomputing_draws_none_of_the_training_s_random_numbers(run, tokenizer):
    """With an evaluation set to score as well, dropout fell in another way."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)

    def trained(eval_rows):
        torch.manual_seed(0)
        policy = get_peft_model(build_tiny_llama(tokenizer), lora)
        run(policy=policy, eval_rows=eval_rows, max_steps=2, learning_rate=1e-2, disable_dropout=False)
        return [parameter for parameter in policy.parameters() if parameter.requires_grad]

    assert all(map(torch.equal, trained(None), trained(CHAT_ROWS[8:])))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-2},
        {"rank": 8},
        {"seed": 7},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[2:4]},
        {"per_device_train_batch_size": 4},
        {"batch_layout": "padded"},
        {"logps_chunk_size": 3},
        {"ld_alpha": 0.5},
        {"loss_type": "ipo"},
        {"beta": 0.5},
        {"max_tokens_per_forward": 30},
        {"precompute_ref_batch_size": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_leaves_the_values_as_they_are_hits(run, change):
    assert run().reference.misses == SIDES
    assert run(**change).reference.misses == 0


def test_a_superset_computes_what_is_new(run):
    run(ROWS[:4])
    assert run().reference.misses == 4


def test_a_length_limit_misses_exactly_where_token_ids_change(run, tokenizer):
    report = run().data_reports["train"]
    assert run(max_length=report.length_max).reference.misses == 0
    cut = run(max_length=report.length_max - 1)
    assert 0 < cut.reference.misses <= 2
    assert cut.data_reports["train"].truncated_share == pytest.approx(1 / len(ROWS))


def test_a_chat_template_misses_where_it_changes_the_tokens(run):
    run()
    other = build_chat_tokenizer()
    other.chat_template = "{# the same #}" + other.chat_template
    assert run(tokenizer=other).reference.misses == 0
    other.chat_template = other.chat_template.replace("<assistant>", "<user>")
    assert run(tokenizer=other).reference.misses == SIDES


def test_other_base_weights_miss(run, tokenizer):
    run()
    model = build_tiny_llama(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert run(policy=get_peft_model(model, LoraConfig(target_modules=["q_proj"]))).reference.misses == SIDES


def test_quantisation_and_compute_dtype_miss(run, base_folder):
    def load(compute=torch.float32, **options):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **options)
        return load_policy(base_folder, quantization_config=quantization)

    found = [
        run(policy=load(bnb_4bit_quant_type="nf4")).reference.misses,
        run(policy=load(bnb_4bit_quant_type="nf4")).reference.misses,
        run(policy=load(bnb_4bit_quant_type="fp4")).reference.misses,
        run(policy=load(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)).reference.misses,
        run(policy=load(torch.bfloat16, bnb_4bit_quant_type="nf4")).reference.misses,
        run(policy=load(bnb_4bit_quant_type="nf4"), bf16=True).reference.misses,
        run(policy=load_policy(base_folder, quantize=False)).reference.misses,
    ]
    assert found == [SIDES, 0, SIDES, SIDES, SIDES, SIDES, SIDES]


def test_another_reference_misses(run, tokenizer):
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    policy = get_peft_model(build_tiny_llama(tokenizer), lora)
    twin = copy.deepcopy(policy)
    assert run(policy=policy).reference.misses == SIDES
    assert run(policy=twin, reference="base").reference.misses == SIDES


@pytest.mark.parametrize("options", [{"loss_type": "ipo"}, {"ld_alpha": 0.3}], ids=["ipo", "ld_alpha"])
def test_training_on_cached_values_is_training_on_live_ones(run, make_args, tokenizer, options):
    def losses(trainer):
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    cached = run(max_steps=3, learning_rate=1e-2, **options)
    torch.manual_seed(cached.args.seed)
    policy = get_peft_model(
        build_tiny_llama(tokenizer), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    args = make_args(max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, **options)
    live = QLoRADPOTrainer(policy, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    live.train()
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)


def test_a_precompute_that_was_killed_goes_on_where_it_was(run, monkeypatch):
    from qlora_dpo import reference

    live, calls = reference.BaseReference.__call__, []

    def dies(self, model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return live(self, model, batch)

    monkeypatch.setattr(reference.BaseReference, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        run(precompute_ref_batch_size=1)
    monkeypatch.setattr(reference.BaseReference, "__call__", live)
    assert run(precompute_ref_batch_size=1).reference.misses == SIDES - 4


def test_a_cache_of_other_values_is_found_out(run, tmp_path):
    """The step-0 margin must be within the rounding of the dtype."""
    trainer = run()
    identity, cache = trainer.reference.identity, LogpsCache(tmp_path / "cache.sqlite")
    batches = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])["pieces"]
    keys = [key for batch in batches for key in batch["keys"]]
    values = cache.get(identity, keys)
    (tmp_path / "cache.sqlite").unlink()
    LogpsCache(tmp_path / "cache.sqlite").put(identity, keys, [np.float32(1.01) * value for value in values])
    with pytest.raises(RuntimeError, match="within rounding"):
        run()


def test_nothing_can_be_computed_before_a_stream_or_without_a_reference(tokenizer, make_args, tmp_path):
    policy = get_peft_model(build_tiny_llama(tokenizer), LoraConfig(target_modules=["q_proj"]))
    options = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "c"), "max_steps": 1}
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    trainer = QLoRADPOTrainer(policy, args=make_args(**options), train_dataset=stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"must be False for a stream, .* got True. Set it to False"):
        trainer.train()
    rows = Dataset.from_list(ROWS)
    args = make_args(reference="none", **options)
    trainer = QLoRADPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"must be False without a reference, got True. Set it to False"):
        trainer.train()
