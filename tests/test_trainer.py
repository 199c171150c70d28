"""The step, evaluation, checkpoints, and what is refused before either."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from qlora_dpo import QLoRADPOTrainer, load_policy
from qlora_dpo.arguments import announce
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.model import default_quantization
from qlora_dpo.report import write_report

from reference_impl import completion_logps, pair_metrics, reference_logps
from tiny_chat import CHAT_ROWS, build_tiny_llama, chat_row, ranked_row

RANKED = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4, 3, 6, 2, 5])]


def policy_of(tokenizer, random_b=False, **lora):
    model = build_tiny_llama(tokenizer)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=not random_b, **lora)
    return get_peft_model(model, config)


def trainer_of(tokenizer, args, rows=CHAT_ROWS, eval_rows=None, policy=None, **options):
    return QLoRADPOTrainer(
        model=policy or policy_of(tokenizer),
        args=args,
        train_dataset=None if rows is None else Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        **options,
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


class KeepGradients(TrainerCallback):
    """The gradient of every optimizer step, as the optimizer sees it."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def first_step(tokenizer, make_args, rows, **options):
    keep = KeepGradients()
    args = make_args(max_steps=1, max_grad_norm=0.0, learning_rate=1e-3, **options)
    trainer = trainer_of(tokenizer, args, rows, policy=policy_of(tokenizer, random_b=True), callbacks=[keep])
    trainer.train()
    return keep.gradients[0], trainer.state.log_history[0]


@pytest.fixture
def base_reference(make_args):
    """Options for a policy that is not at its reference, so that losses and gradients differ between pairs."""
    return lambda **options: make_args(reference="base", **options)


@pytest.mark.parametrize("rows", [CHAT_ROWS[:4], RANKED[:4]], ids=["pairs", "groups of unequal K"])
@pytest.mark.parametrize("split", [(1, 4), (2, 2), (3, 2)])
def test_accumulation_changes_neither_loss_nor_gradient(tokenizer, base_reference, rows, split):
    whole, log = first_step(tokenizer, base_reference, rows, per_device_train_batch_size=4)
    micro, accumulation = split
    parts, split_log = first_step(
        tokenizer,
        base_reference,
        rows,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    assert (parts - whole).norm() < 1e-6 * whole.norm()
    timing = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
    for key in set(log) - timing:
        assert split_log[key] == pytest.approx(log[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_of_either_kind_gives_the_same_step(tokenizer, base_reference, kwargs):
    kept, _ = first_step(tokenizer, base_reference, RANKED, gradient_checkpointing=False)
    recomputed, _ = first_step(
        tokenizer, base_reference, RANKED, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert (recomputed - kept).norm() <= 1e-6 * kept.norm()


EAGER = {"torch_compile": True, "torch_compile_backend": "eager"}


def test_a_compiled_model_gives_the_same_step(tokenizer, base_reference):
    """Traced, and not lowered: that takes a C++ compiler."""
    options = {"rows": CHAT_ROWS[:2], "gradient_checkpointing": False}
    plain, _ = first_step(tokenizer, base_reference, **options)
    compiled, _ = first_step(tokenizer, base_reference, **EAGER, **options)
    torch._dynamo.reset()
    assert (compiled - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize(
    ("options", "reference", "exact", "noisy"),
    [
        ({}, "the base model", False, False),
        ({"torch_compile": True}, "the base model", False, True),
        ({"torch_compile": True}, "the base model", True, False),
        ({"torch_compile": True}, "none", False, False),
        (EAGER, "the base model", False, False),
    ],
)
def test_the_noise_of_compiled_programs_is_said(tokenizer, make_args, options, reference, exact, noisy, recwarn):
    """Measured by hand, as compiling takes two minutes: scripts/PROFILE.md."""
    with torch._inductor.config.patch(emulate_precision_casts=exact):
        announce(policy_of(tokenizer), reference, 0.0, make_args(**options))
    said = [str(w.message) for w in recwarn if "two programs, of the policy and of its reference" in str(w.message)]
    assert len(said) == noisy


def test_liger_is_given_to_the_reference_model_too_and_no_effect_is_said(tokenizer, make_args, monkeypatch):
    """A stand-in: Liger's kernels need a GPU."""
    given = []
    monkeypatch.setattr("qlora_dpo.arguments.apply_liger_kernel", lambda model, config: given.append(model))
    args = make_args()
    args.use_liger_kernel = True
    policy, reference = policy_of(tokenizer), build_tiny_llama(tokenizer)
    with pytest.warns(
        UserWarning, match="`use_liger_kernel` has no effect: Liger has no kernels for llama. Leave it out"
    ):
        trainer_of(tokenizer, args, policy=policy, ref_model=reference)
    assert given == [policy, reference]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_give_the_same_step(tokenizer, base_reference, layout):
    tree, log = first_step(tokenizer, base_reference, RANKED, per_device_train_batch_size=8, batch_layout="tree")
    other, other_log = first_step(tokenizer, base_reference, RANKED, per_device_train_batch_size=8, batch_layout=layout)
    assert (tree - other).norm() < 1e-4 * tree.norm()
    for key in ("loss", "rewards/margins", "entropy", "logits/chosen", "num_tokens"):
        assert log[key] == pytest.approx(other_log[key], rel=1e-5), key
    assert log["num_unique_tokens"] < other_log["num_unique_tokens"]


def test_auto_chooses_the_tree_and_says_what_it_measured(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1))
    trainer.train()
    assert trainer.data_collator.layout == "tree"
    assert trainer.layout_proof.holds


def test_auto_falls_back_to_padded_with_both_numbers(tokenizer, make_args):
    from tiny_models import build

    torch.manual_seed(0)
    model = get_peft_model(build("bloom"), LoraConfig(r=4, target_modules="all-linear"))
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy=model)
    with pytest.warns(UserWarning, match=r"falls back to 'padded'.*differ by [\d.]+ nats.* and [\d.e-]+ are allowed"):
        trainer.train()
    assert trainer.data_collator.layout == "padded"
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_rows_that_must_be_padded_are_refused_where_none_may_be(tokenizer, make_args):
    from tiny_models import build

    model = get_peft_model(build("bloom"), LoraConfig(r=4, target_modules="all-linear"))
    trainer = trainer_of(tokenizer, make_args(max_steps=1, padding_free=True), policy=model)
    with (
        pytest.warns(UserWarning, match="falls back to 'padded'"),
        pytest.raises(NotImplementedError, match="`padding_free` must be False for BloomForCausalLM"),
    ):
        trainer.train()


def test_a_layout_asked_for_by_name_is_used_with_a_warning_if_it_does_not_hold(tokenizer, make_args):
    from tiny_models import build

    torch.manual_seed(0)
    model = get_peft_model(build("bloom"), LoraConfig(r=4, target_modules="all-linear"))
    trainer = trainer_of(tokenizer, make_args(max_steps=1, batch_layout="packed"), policy=model)
    with pytest.warns(UserWarning, match="batch_layout='packed' does not equal 'padded'"):
        trainer.train()
    assert trainer.data_collator.layout == "packed"


def test_a_router_loss_is_refused_for_a_model_without_a_router(tokenizer, make_args):
    with pytest.raises(ValueError, match="which has no router"):
        trainer_of(tokenizer, make_args(router_aux_loss_coef=0.01))


def test_several_gpus_in_one_process_are_refused(tokenizer, make_args, monkeypatch):
    args = make_args()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(RuntimeError, match=r"One process must see one GPU, got 2: .* Start one process per GPU"):
        trainer_of(tokenizer, args)


def test_first_margins_are_exactly_zero_and_first_loss_is_log_2(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1))
    trainer.train()
    first = trainer.state.log_history[0]
    assert (first["rewards/margins"], first["rewards/chosen"], first["rewards/rejected"]) == (0, 0, 0)
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert (first["rewards/accuracies"], first["rewards/ties"]) == (0.5, 1.0)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_first_margins_are_exactly_zero_for_every_chunk_size(base_folder, make_args, chat_rows, chunk_size):
    args = make_args(max_steps=1, logps_chunk_size=chunk_size, bf16=True)
    trainer = QLoRADPOTrainer(model=load_policy(base_folder), args=args, train_dataset=chat_rows)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_first_margins_are_exactly_zero_on_a_four_bit_base(base_folder, make_args, chat_rows):
    trainer = QLoRADPOTrainer(
        model=load_policy(base_folder),
        args=make_args(max_steps=2, bf16=True, learning_rate=1e-2),
        train_dataset=chat_rows,
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert trainer.state.log_history[1]["rewards/ties"] == 0
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_policy_that_does_not_start_at_its_reference_is_stopped(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1))
    with torch.no_grad():  # after construction: what an initialisation that changes the base would look like
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).fill_(0.1)
    with pytest.raises(RuntimeError, match="Step-0 margins must be exactly 0"):
        trainer.train()


def test_small_learning_rates_move_fp32_adapters(base_folder, make_args, chat_rows):
    """After 4 steps at 1e-6 at least 99 % of the elements of A have moved; bf16 adapters keep a few per cent."""
    policy = load_policy(base_folder)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_A" in n}
    args = make_args(max_steps=4, learning_rate=1e-6, bf16=True, reference="base", lr_scheduler_type="constant")
    QLoRADPOTrainer(model=policy, args=args, train_dataset=chat_rows).train()
    moved = torch.cat([(p.detach() != before[n]).flatten() for n, p in policy.named_parameters() if n in before])
    assert moved.float().mean() > 0.99


# ---- evaluation ---------------------------------------------------------------------------------------------------


def naive_rewards(policy, tokenizer, rows, beta=0.1):
    """Chosen and rejected rewards of every pair, one sequence at a time."""
    kept, _ = prepare_dataset(Dataset.from_list(rows), tokenizer, TokenLimits(1024))
    chosen, rejected = [], []
    for row in kept:
        with torch.no_grad():
            pi = completion_logps(policy, row["prompt_ids"], row["completion_ids"])
        rewards = beta * (pi - reference_logps(policy, row["prompt_ids"], row["completion_ids"]))
        chosen += [rewards[w].item() for w, _ in row["pairs"]]
        rejected += [rewards[l].item() for _, l in row["pairs"]]
    return np.array(chosen), np.array(rejected)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_evaluation_is_exact_for_every_batch_size_and_layout(tokenizer, base_reference, batch_size, layout):
    policy = policy_of(tokenizer, random_b=True)
    expected = pair_metrics(*naive_rewards(policy, tokenizer, RANKED))
    args = base_reference(per_device_eval_batch_size=batch_size, batch_layout=layout)
    found = trainer_of(tokenizer, args, rows=None, eval_rows=RANKED, policy=policy).evaluate()
    assert found["eval_rewards/accuracies"] == found["eval_preference_accuracy"] == pytest.approx(expected["accuracy"])
    assert found["eval_rewards/margins"] == pytest.approx(expected["margin"], rel=1e-4)
    assert found["eval_implicit_reward_margin"] == pytest.approx(expected["margin"], rel=1e-4)
    assert found["eval_rewards/chosen"] == pytest.approx(expected["chosen"], rel=1e-4)
    chosen, rejected = naive_rewards(policy, tokenizer, RANKED)
    assert found["eval_loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=1e-4)


def test_named_sets_keep_their_own_keys(tokenizer, base_reference):
    sets = {"a": Dataset.from_list(RANKED[:3]), "b": Dataset.from_list(CHAT_ROWS[:4])}
    policy = policy_of(tokenizer, random_b=True)
    trainer = QLoRADPOTrainer(model=policy, args=base_reference(), eval_dataset=sets, processing_class=tokenizer)
    found = trainer.evaluate()
    for name, rows in (("a", RANKED[:3]), ("b", CHAT_ROWS[:4])):
        expected = pair_metrics(*naive_rewards(policy, tokenizer, rows))
        assert found[f"eval_{name}_rewards/margins"] == pytest.approx(expected["margin"], rel=1e-4)
    assert found["eval_a_rewards/margins"] != found["eval_b_rewards/margins"]


def test_a_set_given_to_evaluate_is_prepared_too(tokenizer, base_reference):
    policy = policy_of(tokenizer, random_b=True)
    trainer = trainer_of(tokenizer, base_reference(), policy=policy)
    found = trainer.evaluate(Dataset.from_list(RANKED), metric_key_prefix="test")
    expected = pair_metrics(*naive_rewards(policy, tokenizer, RANKED))
    assert found["test_rewards/margins"] == pytest.approx(expected["margin"], rel=1e-4)


def test_compute_metrics_gets_every_pair_once(tokenizer, base_reference):
    calls = []

    def compute(prediction):
        calls.append(prediction)
        return {"pairs": len(prediction.label_ids)}

    policy = policy_of(tokenizer, random_b=True)
    args = base_reference(per_device_eval_batch_size=3)
    found = trainer_of(tokenizer, args, rows=None, eval_rows=RANKED, policy=policy, compute_metrics=compute).evaluate()
    chosen, rejected = naive_rewards(policy, tokenizer, RANKED)
    assert len(calls) == 1
    assert found["eval_pairs"] == len(chosen)
    assert np.allclose(calls[0].predictions[0], chosen, rtol=1e-4)
    assert np.allclose(calls[0].predictions[1], rejected, rtol=1e-4)
    assert set(calls[0].label_ids) == set(range(len(RANKED)))


def test_predict_returns_the_rewards_of_every_pair(tokenizer, base_reference):
    policy = policy_of(tokenizer, random_b=True)
    found = trainer_of(tokenizer, base_reference(), policy=policy).predict(Dataset.from_list(RANKED))
    chosen, rejected = naive_rewards(policy, tokenizer, RANKED)
    assert np.allclose(found.predictions[0], chosen, rtol=1e-4)
    assert np.allclose(found.predictions[1], rejected, rtol=1e-4)
    assert found.metrics["test_rewards/margins"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)


def test_training_after_an_evaluation_is_the_same_training(base_folder, make_args, chat_rows):
    def final(evaluate):
        options = {"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}
        args = make_args(max_steps=3, learning_rate=1e-3, bf16=True, **options)
        trainer = QLoRADPOTrainer(
            model=load_policy(base_folder), args=args, train_dataset=chat_rows, eval_dataset=chat_rows.select(range(3))
        )
        trainer.train()
        return weights(trainer)

    torch.manual_seed(5)
    without = final(False)
    torch.manual_seed(5)
    assert torch.equal(final(True), without)


def test_an_evaluation_draws_none_of_the_training_s_random_numbers(tokenizer, make_args):
    """To iterate over a data set draws one, after which dropout would fall in another way."""

    def final(**options):
        args = make_args(max_steps=3, learning_rate=1e-3, disable_dropout=False, **options)
        trainer = trainer_of(tokenizer, args, eval_rows=RANKED[:3], policy=policy_of(tokenizer, lora_dropout=0.3))
        if options:
            trainer.evaluate()
            trainer.predict(Dataset.from_list(RANKED[:2]))
        trainer.train()
        return weights(trainer)

    assert torch.equal(final(eval_strategy="steps", eval_steps=1), final())


# ---- checkpoints --------------------------------------------------------------------------------------------------


def test_resuming_gives_the_same_weights_and_curve_bit_for_bit(tokenizer, make_args, tmp_path):
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2,
        "learning_rate": 1e-3, "per_device_train_batch_size": 3,
    }  # fmt: skip
    whole = trainer_of(tokenizer, make_args(output_dir=str(tmp_path / "a"), **options), eval_rows=RANKED)
    whole.train()
    resumed = trainer_of(tokenizer, make_args(output_dir=str(tmp_path / "b"), **options), eval_rows=RANKED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    for one, other in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        for key in ("loss", "rewards/margins", "eval_loss", "num_tokens"):
            assert one.get(key) == other.get(key), (key, one["step"])


def test_a_checkpoint_holds_what_is_needed_and_no_token(tokenizer, make_args):
    args = make_args(max_steps=1, save_strategy="steps", save_steps=1, hub_token="hf_secret")
    trainer = trainer_of(tokenizer, args)
    trainer.train()
    trainer.save_model()
    files = {path.name for path in Path(args.output_dir, "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "qlora_dpo.json"} <= files
    written = [path for path in Path(args.output_dir).rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_secret" in path.read_bytes()]
    record = json.loads(Path(args.output_dir, "qlora_dpo.json").read_text())
    assert (record["beta"], record["loss"]["loss_type"], record["reference"]) == (0.1, ["sigmoid"], "base")


def test_early_stopping_and_the_best_checkpoint_are_trainers_own(tokenizer, make_args):
    args = make_args(
        max_steps=20, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="eval_rewards/margins", greater_is_better=True,
    )  # fmt: skip
    trainer = trainer_of(tokenizer, args, eval_rows=RANKED, callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step < 5
    assert trainer.state.best_metric == 0


# ---- what a user may pass -----------------------------------------------------------------------------------------


def test_the_constructor_is_that_of_trl():
    trl = pytest.importorskip("trl")
    ours = list(inspect.signature(QLoRADPOTrainer.__init__).parameters)
    assert ours == list(inspect.signature(trl.DPOTrainer.__init__).parameters)


def test_a_model_given_by_name_is_loaded_in_four_bit_with_default_lora(base_folder, make_args, chat_rows, capsys):
    trainer = QLoRADPOTrainer(model=base_folder, args=make_args(max_steps=1, bf16=True), train_dataset=chat_rows)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    assert trainer.model.peft_config["default"].r == 16
    assert "4 bit" in capsys.readouterr().err
    trainer.train()


def test_a_model_object_is_wrapped_with_peft_config(tokenizer, make_args):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = trainer_of(tokenizer, make_args(max_steps=1), policy=build_tiny_llama(tokenizer), peft_config=config)
    trainer.train()
    assert trainer.model.peft_config["default"].r == 2


def test_an_adapter_of_any_name_trains(tokenizer, make_args):
    model = get_peft_model(build_tiny_llama(tokenizer), LoraConfig(target_modules="all-linear"), adapter_name="mine")
    trainer = trainer_of(tokenizer, make_args(max_steps=2, learning_rate=1e-2), policy=model)
    trainer.train()
    assert trainer.state.log_history[1]["rewards/margins"] != 0


def test_a_stream_of_rows_trains(tokenizer, make_args):
    stream = Dataset.from_list(CHAT_ROWS).to_iterable_dataset()
    args = make_args(max_steps=2, per_device_train_batch_size=2)
    trainer = QLoRADPOTrainer(model=policy_of(tokenizer), args=args, train_dataset=stream, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_without_a_reference_rewards_are_beta_log_pi(tokenizer, make_args):
    trainer = trainer_of(tokenizer, make_args(max_steps=1, reference="none", beta=0.5))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0.5 * first["logps/chosen"])


def test_a_loss_that_is_not_finite_is_shown(tokenizer, make_args):
    policy = policy_of(tokenizer)
    trainer = trainer_of(tokenizer, make_args(max_steps=1, reference="none", batch_layout="padded"), policy=policy)
    trainer._proven = True
    with torch.no_grad():
        policy.get_base_model().model.norm.weight.fill_(float("nan"))
    trainer.train()
    assert np.isnan(trainer.state.log_history[0]["loss"])


def test_a_quantised_model_without_adapters_is_refused(base_folder, make_args, chat_rows):
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=default_quantization())
    with pytest.raises(
        ValueError, match=r"`model` must have an adapter to train, got a quantised one without. Pass `peft_config`"
    ):
        QLoRADPOTrainer(model=model, args=make_args(), train_dataset=chat_rows)


def test_constructor_arguments_that_cannot_be_honoured_are_refused(tokenizer, make_args, chat_rows):
    model, args = policy_of(tokenizer), make_args()
    common = {"model": model, "args": args, "train_dataset": chat_rows, "processing_class": tokenizer}
    for options, error, message in [
        ({"ref_model": model}, ValueError, "`ref_model` must be another object"),
        ({"args": object()}, TypeError, "must be a QLoRADPOConfig"),
        ({"data_collator": lambda rows: rows}, TypeError, "must be a GroupCollator"),
        ({"train_dataset": None}, ValueError, "got neither"),
        ({"train_dataset": CHAT_ROWS}, TypeError, "Dataset.from_list"),
        ({"quantization_config": default_quantization()}, ValueError, "for a model that is loaded"),
        ({"processing_class": "tokenizer"}, TypeError, "must be a tokenizer"),
        ({"model": build_tiny_llama(tokenizer)}, ValueError, "`model` must have an adapter to train, got one without"),
        (
            {"args": make_args(model_init_kwargs={"token": "secret"})},
            ValueError,
            r"`model_init_kwargs` must be None for a model that is loaded, got \['token'\]. Load the model with them",
        ),
    ]:
        with pytest.raises(error, match=message):
            QLoRADPOTrainer(**(common | options))


def test_training_without_rows_and_evaluating_without_rows_are_refused(tokenizer, make_args):
    with pytest.raises(ValueError, match="`train_dataset` must be given"):
        trainer_of(tokenizer, make_args(), rows=None, eval_rows=RANKED).train()
    with pytest.raises(ValueError, match="`eval_dataset` must be given"):
        trainer_of(tokenizer, make_args()).evaluate()


def test_requires_grad_is_the_same_before_and_after_training(tokenizer, make_args):
    policy = policy_of(tokenizer)
    frozen = next(n for n, _ in policy.named_parameters() if "lora_A" in n)
    policy.get_parameter(frozen).requires_grad_(False)
    before = {n: p.requires_grad for n, p in policy.named_parameters()}
    trainer_of(tokenizer, make_args(max_steps=2), policy=policy).train()
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == before


def test_rows_keep_their_own_groups(tokenizer, make_args):
    """Two rows with one prompt are two groups."""
    row = chat_row(1)
    trainer = trainer_of(tokenizer, make_args(), rows=[row, row | {"rejected": chat_row(2)["rejected"]}])
    assert len(trainer.train_dataset) == 2


def test_a_saved_model_can_be_reported_on_without_save_state(tokenizer, make_args, tmp_path):
    trainer = trainer_of(tokenizer, make_args(max_steps=1))
    trainer.save_model(str(tmp_path / "before"))
    assert not (tmp_path / "before" / "trainer_state.json").exists()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "Loss" in Path(write_report(str(tmp_path / "saved"))).read_text()
