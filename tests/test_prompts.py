"""Rows with one prompt as one group: the same pairs, losses and gradients, from fewer tokens."""

import itertools
import tracemalloc

import pytest
import torch
from datasets import Dataset, IterableDataset

from qlora_dpo import QLoRADPOConfig
from qlora_dpo.data import TokenLimits, prepare_dataset
from qlora_dpo.data_report import DataReport
from qlora_dpo.prompts import merge_prompts, tokens_once

from test_trainer import RANKED, first_step, policy_of, trainer_of, weights
from tiny_chat import CHAT_ROWS, ranked_row

FOUR, THREE = ranked_row(0, 4) | {"scores": [3.0, 1.0, 2.0, 9.0]}, ranked_row(1, 3) | {"scores": [1.0, 9.0, 0.0]}
TWO = [ranked_row(seed, 2) for seed in (2, 3, 4)]


def unrolled(row):
    """A ranked row as TRL would have it: a row for each better completion with every worse one."""
    order = sorted(range(len(row["completions"])), key=lambda i: -row["scores"][i])
    pairs = [(w, l) for w, l in itertools.combinations(order, 2) if row["scores"][w] != row["scores"][l]]
    texts = row["completions"]
    return [{"prompt": row["prompt"], "chosen": texts[w], "rejected": texts[l]} for w, l in pairs]


def first_pair(row):
    return unrolled(row)[0]


ROWS = [row for rows in zip(unrolled(FOUR), [*unrolled(THREE), *map(first_pair, TWO)], strict=True) for row in rows]
"""Of two prompts with six and three pairs, and of three prompts with one, in turns."""


def prepared(rows, tokenizer, **options):
    found, report = prepare_dataset(Dataset.from_list(rows), tokenizer, TokenLimits(), **options)
    return found, report


def as_texts(group):
    """The pairs of a group, as sides of token ids, in any order."""
    ids = [tuple(one) for one in group["completion_ids"]]
    return sorted((ids[w], ids[l]) for w, l in group["pairs"])


def test_pairs_of_a_ranking_are_the_ranking_again(tokenizer):
    merged, report = prepared(ROWS, tokenizer, merge=True)
    ranked, _ = prepared([FOUR, THREE, *TWO], tokenizer)
    assert (report.rows, report.groups, report.pairs) == (12, 5, 12)
    for one, other in zip(merged, ranked, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert len(one["completion_ids"]) == len(other["completion_ids"])
        assert as_texts(one) == as_texts(other)
    assert merged["row"] == [0, 1, 7, 9, 11]


def test_equal_and_opposite_pairs_all_count(tokenizer):
    pair = unrolled(THREE)[0]
    turned = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    (group,), _ = prepared([pair, turned, pair], tokenizer, merge=True)
    assert group["pairs"] == [[0, 1], [1, 0], [0, 1]]
    assert len(group["completion_ids"]) == 2


def test_numbers_of_pairs_stay_with_their_pairs(tokenizer):
    rows = [row | {"weights": [0.5 + i], "label_probs": [1 - i / 20]} for i, row in enumerate(unrolled(FOUR))]
    apart, _ = prepared(rows, tokenizer)
    (group,), _ = prepared(rows, tokenizer, merge=True)
    ids = [tuple(one) for one in group["completion_ids"]]
    of_pairs = zip(group["pairs"], group["weights"], group["label_probs"], strict=True)
    found = {(ids[w], ids[l]): (weight, p) for (w, l), weight, p in of_pairs}
    for row in apart:
        w, l = row["pairs"][0]
        sides = tuple(row["completion_ids"][w]), tuple(row["completion_ids"][l])
        assert found[sides] == (row["weights"][0], row["label_probs"][0])


def test_a_completion_with_two_reference_values_is_two(tokenizer):
    first, second, third = unrolled(THREE)  # the best is in the first two, the second best in the first and the last
    given = [(-5.0, -6.0), (-5.0, -7.0), (-6.5, -7.0)]
    rows = [
        row | {"ref_chosen_logps": w, "ref_rejected_logps": l}
        for row, (w, l) in zip((first, second, third), given, strict=True)
    ]
    (group,), _ = prepared(rows, tokenizer, merge=True)
    assert group["ref_logps"] == [-5.0, -6.0, -7.0, -6.5]
    assert group["pairs"] == [[0, 1], [0, 2], [3, 2]]
    assert group["completion_ids"][1] == group["completion_ids"][3]


@pytest.mark.parametrize("loss", ["sigmoid", "aot_unpaired", "sft"])
def test_a_step_over_all_rows_is_the_same_step(loss, tokenizer, make_args):
    options = {"per_device_train_batch_size": 12, "loss_type": [loss], "reference": "base"}
    apart, log = first_step(tokenizer, make_args, ROWS, **options)
    merged, merged_log = first_step(tokenizer, make_args, ROWS, merge_prompts=True, **options)
    assert (merged - apart).norm() < 1e-5 * apart.norm()
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "num_tokens"):
        assert merged_log[key] == pytest.approx(log[key], rel=1e-5), key
    assert merged_log["num_unique_tokens"] < 0.7 * log["num_unique_tokens"]


def test_evaluations_keep_their_rows(tokenizer, make_args):
    """What an evaluation says of a row, and its intervals over rows, are of the rows that there are."""
    args = make_args(merge_prompts=True, reference="base")
    policy = policy_of(tokenizer, random_b=True)
    found = trainer_of(tokenizer, args, ROWS, ROWS, policy=policy).predict(Dataset.from_list(ROWS))
    assert sorted(found.label_ids) == list(range(12))


def test_tokenised_rows_are_merged_too(tokenizer):
    rows, _ = prepared(ROWS, tokenizer)
    again, _ = prepare_dataset(rows, tokenizer, TokenLimits(), merge=True)
    assert [as_texts(group) for group in again] == [as_texts(group) for group in merge_prompts(rows)]
    assert len(again) == 5


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_tokenised_rows_of_any_format_are_merged(kind, tokenizer):
    """Tensors differ from each other whatever they hold, so that nothing was merged, and nothing was said."""
    rows, _ = prepared(ROWS, tokenizer)
    again, _ = prepare_dataset(rows.with_format(kind), tokenizer, TokenLimits(), merge=True)
    assert again.with_format(None).to_list() == merge_prompts(rows).to_list()


def test_counting_tokens_keeps_no_copy_of_them():
    """At every start it took 0.7 GB for 50,000 pairs of 800 tokens."""
    prompts, completions = ([seed] for seed in range(200)), ([range(seed, seed + 2000)] for seed in range(300, 500))
    tracemalloc.start()
    assert tokens_once(prompts, completions) == 200 * 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2000


def test_rows_of_different_prompts_are_left_as_they_are(tokenizer):
    rows, _ = prepared(CHAT_ROWS, tokenizer)
    assert merge_prompts(rows) is rows


def test_a_run_goes_on_with_merged_prompts(tokenizer, make_args, tmp_path):
    options = {"merge_prompts": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = trainer_of(tokenizer, make_args(output_dir=str(tmp_path / "a"), **options), ROWS)
    whole.train()
    resumed = trainer_of(tokenizer, make_args(output_dir=str(tmp_path / "b"), **options), ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))


def test_the_report_says_what_merging_would_spare_and_what_it_spares(tokenizer, capsys):
    rows, apart = prepared(ROWS, tokenizer)
    _, merged = prepared(ROWS, tokenizer, merge=True)
    assert apart.tokens_merged == merged.tokens == merged.tokens_merged < 0.7 * apart.tokens
    assert apart.tokens_merged == tokens_once(rows["prompt_ids"], rows["completion_ids"])
    fewer = f"{1 - merged.tokens / apart.tokens:.0%}"
    assert f"prompts repeat: `merge_prompts` would compute {merged.tokens:,}, {fewer} fewer" in str(apart)
    assert "prompts repeat" not in str(merged)
    _, of_others = prepared(RANKED, tokenizer)
    assert isinstance(of_others, DataReport)
    assert "prompts repeat" not in str(of_others)
    _, evaluated = prepared(ROWS, tokenizer, name="eval")
    assert "prompts repeat" not in str(evaluated)


def test_a_stream_cannot_be_merged(tokenizer):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(
        ValueError, match=r"`merge_prompts` must be False for a stream.*got a train data set that is one"
    ):
        prepare_dataset(stream, tokenizer, TokenLimits(), merge=True)


def test_rankings_cannot_be_merged(tmp_path):
    with pytest.raises(ValueError, match="`merge_prompts` must not be used with loss_type='plackett_luce'"):
        QLoRADPOConfig(output_dir=str(tmp_path), merge_prompts=True, loss_type="plackett_luce")
