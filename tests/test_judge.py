"""Reports of a policy on preference data: the trainer's own numbers, the divergence exact, the files readable again."""

import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model

from qlora_dpo import PreferenceReport, QLoRADPOTrainer, evaluate_preferences, load_policy
from qlora_dpo.forward import install_scoring
from qlora_dpo.judge import judged

from reference_impl import completion_logits, completion_logps
from tiny_chat import CHAT_ROWS, build_tiny_llama, ranked_row

RANKED = [ranked_row(seed, count) | {"subset": "ab"[seed % 2]} for seed, count in enumerate([3, 5, 2, 4, 3])]


def policy_of(tokenizer, **lora):
    torch.manual_seed(1)
    options = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(build_tiny_llama(tokenizer), LoraConfig(r=4, **options))


def evaluated(tokenizer, args, rows, policy=None):
    trainer = QLoRADPOTrainer(
        policy or policy_of(tokenizer), args=args, eval_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer, trainer.evaluate()


def naive_divergence(policy, prompt_ids, completion_ids):
    """Sum over tokens of KL(policy || base), from whole logits in fp64."""
    with torch.no_grad():
        log_p = completion_logits(policy, prompt_ids, completion_ids).double().log_softmax(-1)
        with policy.disable_adapter():
            log_q = completion_logits(policy, prompt_ids, completion_ids).double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum().item()


@pytest.mark.parametrize("options", [{}, {"batch_layout": "padded", "max_tokens_per_forward": 12}], ids=["tree", "cut"])
def test_the_divergence_is_that_of_whole_logits(tokenizer, make_args, options):
    policy = policy_of(tokenizer)
    trainer, metrics = evaluated(tokenizer, make_args(reference="base", **options), RANKED, policy)
    groups = {row["row"]: row for row in trainer.eval_dataset}
    expected = {"chosen": [], "rejected": []}
    for row, number in zip(trainer.last_pairs.rows(), trainer.last_pairs.pair_ids(), strict=True):
        group = groups[row]
        for side, i in zip(expected, group["pairs"][number], strict=True):
            expected[side].append(naive_divergence(policy, group["prompt_ids"], group["completion_ids"][i]))
    for side, values in expected.items():
        assert trainer.last_pairs.column(f"kl_{side}") == pytest.approx(values, rel=1e-3)
        tokens = trainer.last_pairs.column(f"tokens_{side}").sum()
        assert metrics[f"eval_kl/{side}"] == pytest.approx(sum(values) / tokens, rel=1e-3)
    assert min(expected["chosen"]) > 0.01


def test_a_policy_at_its_reference_diverges_by_nothing(tokenizer, make_args):
    policy = policy_of(tokenizer, init_lora_weights=True)
    _, metrics = evaluated(tokenizer, make_args(), CHAT_ROWS, policy)
    assert metrics["eval_kl/chosen"] == metrics["eval_kl/rejected"] == 0


@pytest.mark.parametrize("case", ["an adapted head", "no reference", "switched off"])
def test_a_divergence_that_is_not_to_be_had_is_left_out(tokenizer, make_args, case):
    targets = ["q_proj", "lm_head"] if case == "an adapted head" else ["q_proj"]
    options = {"reference": "none"} if case == "no reference" else {"reference": "base"}
    args = make_args(eval_kl=case != "switched off", **options)
    trainer, metrics = evaluated(tokenizer, args, CHAT_ROWS, policy_of(tokenizer, target_modules=targets))
    assert "eval_kl/chosen" not in metrics
    assert judged(trainer, "rows").kl_per_token is None


def test_through_a_head_whose_bias_is_trained_no_divergence_is_told(tokenizer, make_args):
    """Policy and reference have another head each, and the exact divergence is computed through one."""
    model = build_tiny_llama(tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    _, metrics = evaluated(tokenizer, make_args(reference="initial"), CHAT_ROWS, policy)
    assert "eval_kl/chosen" not in metrics


def test_a_report_holds_the_trainers_own_numbers(tokenizer, make_args, tmp_path):
    trainer, metrics = evaluated(tokenizer, make_args(reference="base"), RANKED)
    report = judged(trainer, "ranked", str(tmp_path))
    assert report.accuracy.value == pytest.approx(metrics["eval_rewards/accuracies"])
    assert report.margin.mean == pytest.approx(metrics["eval_rewards/margins"])
    assert report.rewards.chosen == pytest.approx(metrics["eval_rewards/chosen"])
    assert report.kl_per_token.rejected == pytest.approx(metrics["eval_kl/rejected"])
    assert (report.groups, report.pairs) == (5, len(trainer.last_pairs.rows()))
    assert [part.name for part in report.by_subset] == ["a", "b"]
    assert PreferenceReport.from_dict(json.loads((tmp_path / "report.json").read_text())) == report
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert np.mean([line["margin"] for line in lines]) == pytest.approx(report.margin.mean)
    assert lines[0]["prompt"] == tokenizer.decode(trainer.eval_dataset[0]["prompt_ids"])


def test_rows_of_one_prompt_are_judged_as_its_list(tokenizer, make_args):
    """The same pairs, a row each: the same interval, in the report and in the record of the evaluation."""
    lists = RANKED * 5
    unrolled = [
        {"prompt": row["prompt"], "chosen": row["completions"][w], "rejected": row["completions"][l]}
        for row in lists
        for w, l in itertools.permutations(range(len(row["scores"])), 2)
        if row["scores"][w] > row["scores"][l]
    ]
    whole, apart = (evaluated(tokenizer, make_args(reference="base"), rows)[0] for rows in (lists, unrolled))
    first, second = (judged(trainer, "x").accuracy for trainer in (whole, apart))
    assert (first.value, first.count) == (second.value, second.count)
    assert (first.low, first.high, first.method) == (second.low, second.high, second.method)
    assert first.method.endswith("over prompts")
    assert whole.last_pairs.evaluation()["accuracy"] == apart.last_pairs.evaluation()["accuracy"]


def test_a_policy_without_a_reference_is_judged_alone(tokenizer, make_args):
    args = make_args(reference="none", loss_type="simpo", beta=2.0)
    trainer, _ = evaluated(tokenizer, args, CHAT_ROWS)
    assert judged(trainer, "x").reference_accuracy is None


def test_the_references_own_accuracy_is_beside_the_policys(tokenizer, make_args):
    policy = policy_of(tokenizer)
    trainer, _ = evaluated(tokenizer, make_args(reference="base"), CHAT_ROWS, policy)
    install_scoring(policy.get_base_model())
    wins = []
    with policy.disable_adapter(), torch.no_grad():
        for row in trainer.eval_dataset:
            w, l = completion_logps(policy, row["prompt_ids"], row["completion_ids"])
            wins.append((w > l).item())
    assert judged(trainer, "rows").reference_accuracy.value == pytest.approx(np.mean(wins))


def test_evaluate_preferences_needs_a_policy_and_rows_only(tokenizer, tmp_path):
    policy = policy_of(tokenizer)
    rows = Dataset.from_list([row | {"label_probs": 0.9} for row in CHAT_ROWS])
    report = evaluate_preferences(policy, rows, tokenizer, name="chats", output_dir=str(tmp_path))
    assert (report.name, report.pairs) == ("chats", 12)
    assert "chats" in str(report)
    assert (tmp_path / "pairs.jsonl").is_file()


def test_a_report_without_an_evaluation_is_refused(tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    trainer = QLoRADPOTrainer(policy_of(tokenizer), args=make_args(), eval_dataset=rows, processing_class=tokenizer)
    with pytest.raises(RuntimeError, match="An evaluation must come before its report"):
        judged(trainer, "rows")


def test_rewards_that_are_not_finite_are_not_judged(tokenizer, make_args):
    policy = policy_of(tokenizer)
    trainer, _ = evaluated(tokenizer, make_args(reference="base"), CHAT_ROWS, policy)
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_B" in n).fill_(torch.nan)
    trainer.evaluate()
    with pytest.raises(RuntimeError, match="Rewards must be finite to be judged"):
        judged(trainer, "rows")


def test_a_subset_that_some_rows_lack_is_a_slice_of_the_others(tokenizer, make_args):
    rows = [row | {"subset": "code" if i < 5 else None} for i, row in enumerate(CHAT_ROWS)]
    trainer, _ = evaluated(tokenizer, make_args(reference="base"), rows)
    assert [(part.name, part.accuracy.count) for part in judged(trainer, "rows").by_subset] == [("code", 5)]


def test_a_stream_that_several_workers_read_has_metrics_and_no_report(tokenizer, make_args):
    stream = Dataset.from_list(CHAT_ROWS).to_iterable_dataset(num_shards=4)
    found = []
    for workers in (0, 2):
        args = make_args(reference="base", dataloader_num_workers=workers)
        trainer = QLoRADPOTrainer(policy_of(tokenizer), args=args, eval_dataset=stream, processing_class=tokenizer)
        trainer.evaluate()
        found.append(trainer.last_pairs.evaluation())
    assert found[0]["groups"] == found[1]["groups"] == len(CHAT_ROWS)
    assert found[0]["accuracy"] == found[1]["accuracy"]
    with pytest.raises(ValueError, match="`dataloader_num_workers` must be 0 or 1 for a report of a stream"):
        judged(trainer, "rows")


def test_what_is_no_data_set_is_refused(tokenizer):
    for rows in (CHAT_ROWS, DatasetDict(test=Dataset.from_list(CHAT_ROWS))):
        with pytest.raises(TypeError, match="`dataset` must be one datasets"):
            evaluate_preferences(policy_of(tokenizer), rows, tokenizer)


def test_log_probs_that_rows_bring_as_trl_names_them_are_the_reference(base_folder, tokenizer, make_args):
    rows = Dataset.from_list([row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in CHAT_ROWS])
    args = make_args(max_steps=1)
    trainer = QLoRADPOTrainer(load_policy(base_folder), None, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert evaluate_preferences(load_policy(args.output_dir), rows, tokenizer).pairs == len(CHAT_ROWS)


def test_an_adapter_is_judged_as_it_was_trained(base_folder, tokenizer, make_args):
    args = make_args(beta=0.7, max_length=40, max_steps=1, learning_rate=1e-2, per_device_train_batch_size=4)
    rows = Dataset.from_list(CHAT_ROWS)
    policy = load_policy(base_folder)
    trainer = QLoRADPOTrainer(policy, None, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    report = evaluate_preferences(load_policy(args.output_dir), rows, tokenizer)
    trainer.evaluate()
    own = judged(trainer, "rows")
    assert report.beta == own.beta == 0.7
    assert report.pairs == own.pairs
    assert report.margin.mean == pytest.approx(own.margin.mean, rel=1e-5)


def test_a_report_has_the_strength_that_the_trainer_has_now(tokenizer, make_args):
    trainer, _ = evaluated(tokenizer, make_args(reference="base", beta=0.1), CHAT_ROWS)
    before = judged(trainer, "rows")
    trainer.beta = 0.5
    trainer.evaluate()
    after = judged(trainer, "rows")
    assert (before.beta, after.beta) == (0.1, 0.5)
    assert after.margin.mean == pytest.approx(5 * before.margin.mean, rel=1e-5)
    assert after.reference_accuracy == before.reference_accuracy
