"""The report of some pairs: what it says, by hand, and that it says it again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_measures import random_pairs, taken, two_pairs

from qlora_dpo.preference_report import PreferenceReport, preference_report


def test_a_reference_of_zeros_ties_every_pair_though_rewards_are_rounded():
    """Without a reference rewards are beta log pi, and logps - reward / beta is 0 but for the rounding to fp32."""
    logps = np.random.default_rng(0).uniform(-900, -1, (2, 50)).astype(np.float32)
    rewards = np.float32(0.1) * logps
    pairs = random_pairs(
        50, 50, logps_chosen=logps[0], logps_rejected=logps[1], reward_chosen=rewards[0], reward_rejected=rewards[1]
    )
    assert (pairs.ref_logps_chosen != pairs.ref_logps_rejected).any()
    assert preference_report(pairs, "x").reference_accuracy.value == 0.5


def test_without_a_reference_there_is_no_accuracy_of_it():
    """All of its pairs would tie, and 0.5 be said of a base that nobody scored."""
    report = preference_report(two_pairs(referenced=False), "x")
    assert report.reference_accuracy is None
    assert "of the reference" not in str(report)
    assert "log pi, nats" in str(report)
    assert "log-ratio" not in str(report)
    assert PreferenceReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_rows_of_one_prompt_are_no_more_independent_than_pairs_of_one_row():
    """Lists that are written out as rows have the interval of the lists."""
    lists = random_pairs()
    unrolled = replace(lists, row=np.arange(300), prompt=[f"prompt {row}" for row in lists.row])
    assert preference_report(unrolled, "x").accuracy == preference_report(lists, "x").accuracy
    assert preference_report(unrolled, "x").by_subset == preference_report(lists, "x").by_subset
    assert preference_report(lists, "x").accuracy.method == "bootstrap over prompts"
    assert preference_report(replace(unrolled, prompt=None), "x").accuracy.method == "wilson"


def test_report_of_two_pairs_by_hand():
    """Rewards per token 2/4 to 1/2 and 0/1 to 1/2: a tie and a loss. Log-ratios 4 and 0 over 5, 2 and 2 over 4 tokens.

    The reference prefers -14 to -7 wrongly and -6 to -8 rightly. Of the rewards 2 beats 1 and 1, and 0 none.
    """
    found = preference_report(two_pairs(kl_chosen=[1.0, 0.5], kl_rejected=[0.0, 2.0]), "two")
    assert (found.name, found.beta, found.pairs, found.groups, found.ties) == ("two", 0.5, 2, 2, 0.0)
    assert found.accuracy.value == 0.5
    assert found.accuracy_per_token.value == 0.25
    assert found.reference_accuracy.value == 0.5
    assert (found.margin.mean, found.margin.std, found.margin_per_token.mean) == (0.0, 1.0, -0.25)
    assert (found.rewards.chosen, found.rewards.rejected) == (1.0, 1.0)
    assert (found.drift.chosen, found.drift.rejected) == (2.0, 2.0)
    assert (found.logratio_per_token.chosen, found.logratio_per_token.rejected) == (4 / 5, 4 / 4)
    assert (found.kl_per_token.chosen, found.kl_per_token.rejected) == (1.5 / 5, 2 / 4)
    assert (found.tokens.chosen, found.tokens.rejected) == (2.5, 2.0)
    assert found.auc == 0.5
    assert [(part.name, part.accuracy.value, part.margin) for part in found.by_length] == [
        ("chosen shorter", 0.0, -1.0),
        ("chosen longer", 1.0, 1.0),
    ]
    assert found.by_subset == found.by_turns == []


@pytest.mark.parametrize("seed", range(3))
def test_report_is_the_same_to_the_bit_in_any_order(seed):
    pairs = random_pairs(seed=seed)
    shuffled = taken(pairs, np.random.default_rng(9).permutation(300))
    assert preference_report(shuffled, "x") == preference_report(pairs, "x")


@pytest.mark.parametrize("optional", [True, False])
def test_report_survives_json(optional):
    none = dict.fromkeys(("kl_chosen", "kl_rejected", "label_probs", "subset", "turns"))
    report = preference_report(random_pairs(**({} if optional else none)), "x")
    assert PreferenceReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert (report.kl_per_token is None) is not optional


def test_report_of_one_pair_has_an_interval_and_no_spread():
    report = preference_report(random_pairs(1), "one")
    assert report.accuracy.method == "wilson"
    assert report.accuracy.high - report.accuracy.low > 0.7
    assert report.margin.std == 0.0
    assert "one: 1 pairs of 1 rows" in str(report)


def test_report_fits_a_terminal_of_100_columns_whatever_it_is_called():
    pairs = random_pairs(subset=["a subset whose name goes on and on and on"] * 300)
    shown = str(preference_report(replace(pairs, logps_chosen=1e7 * pairs.logps_chosen), "a long name " * 20))
    assert max(map(len, shown.splitlines())) <= 100
    for word in ("accuracy", "of the reference", "AUC", "KL per token", "chosen shorter", "by turns", "ECE", "Brier"):
        assert word in shown


def test_other_keys_than_those_of_a_report_are_refused():
    with pytest.raises(ValueError, match=r"`data` must have the keys of `to_dict`, got other \['accuracy', "):
        PreferenceReport.from_dict({})
