"""Numbers about preference pairs, against hand-derived values and oracles that try everything."""

import doctest
import math
import time
from dataclasses import fields, replace
from pathlib import Path
from statistics import NormalDist

import evaluate
import numpy as np
import pytest

from qlora_dpo import measures
from qlora_dpo.measures import (
    FEW_PROMPTS,
    Estimate,
    Pairs,
    accuracy,
    accuracy_estimate,
    auc,
    bootstrap_interval,
    by,
    calibration,
    distribution,
    length_classes,
    wilson_interval,
)

MODULES = Path(measures.__file__).parent / "evaluate_metrics"
NAMES = ("preference_accuracy", "implicit_reward_margin", "preference_calibration")
PATHS = [str(MODULES / name) for name in NAMES]


def random_pairs(count=300, rows=60, seed=0, **changes):
    """Pairs with shared rows and, rewards being rounded, with ties."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 60, (2, count))
    rewards = random.normal(0, 1, (2, count)).round(1) + np.array([[0.3], [0.0]])
    logps = -1.5 * tokens + 10 * rewards
    columns = dict(
        row=random.integers(0, rows, count),
        reward_chosen=rewards[0],
        reward_rejected=rewards[1],
        logps_chosen=logps[0],
        logps_rejected=logps[1],
        tokens_chosen=tokens[0],
        tokens_rejected=tokens[1],
        beta=0.1,
        kl_chosen=0.01 * tokens[0],
        kl_rejected=0.02 * tokens[1],
        label_probs=random.random(count),
        subset=random.choice(["chat", "code"], count).tolist(),
        turns=random.integers(1, 4, count),
    )
    return Pairs(**(columns | changes))


def two_pairs(**changes):
    """Rewards 2 over 1 and 0 over 1 of 4 and 2, and 1 and 2 tokens, with beta 0.5."""
    columns = dict(
        row=[0, 1],
        reward_chosen=[2.0, 0.0],
        reward_rejected=[1.0, 1.0],
        logps_chosen=[-10.0, -6.0],
        logps_rejected=[-5.0, -6.0],
        tokens_chosen=[4, 1],
        tokens_rejected=[2, 2],
        beta=0.5,
    )
    return Pairs(**(columns | changes))


def taken(pairs, order):
    columns = {
        field.name: getattr(pairs, field.name) for field in fields(pairs) if field.name not in ("beta", "referenced")
    }
    return replace(pairs, **{name: None if values is None else values[order] for name, values in columns.items()})


def score_test_root(wins, count, z, low, high):
    """Where (wins / count - p)^2 - z^2 p (1 - p) / count changes sign, by bisection."""

    def gap(p):
        return (wins / count - p) ** 2 - z * z * p * (1 - p) / count

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (gap(middle) > 0) == (gap(low) > 0) else (low, middle)
    return low


# Intervals


@pytest.mark.parametrize(("wins", "count"), [(1, 7), (3.5, 7), (6, 7), (49, 80), (999.5, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_ends_are_the_roots_of_the_score_equation(wins, count, confidence):
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = wilson_interval(wins, count, confidence)
    assert low == pytest.approx(score_test_root(wins, count, z, 0.0, wins / count), abs=1e-12)
    assert high == pytest.approx(score_test_root(wins, count, z, wins / count, 1.0), abs=1e-12)


@pytest.mark.parametrize("count", [1, 3, 17, 1000])
def test_wilson_of_all_wins_ends_at_one_and_of_none_at_zero(count):
    """Without a win the score equation is p = z^2 (1 - p) / n: the high end is z^2 / (n + z^2)."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert wilson_interval(0, count) == (0.0, pytest.approx(z2 / (count + z2)))
    assert wilson_interval(count, count) == (pytest.approx(count / (count + z2)), 1.0)


def test_bootstrap_equals_a_loop_over_every_draw_of_two_clusters():
    """Clusters {1, 1, 1} and {0}: of four equal draws one gives 1, one 0 and two 3/4. 30 % lies in the middle."""
    assert bootstrap_interval([1, 1, 1, 0], [5, 5, 5, 9], confidence=0.3) == (0.75, 0.75)
    assert bootstrap_interval([1, 1, 1, 0], [5, 5, 5, 9], confidence=0.95) == (0.0, 1.0)


def test_bootstrap_has_the_same_distribution_by_kinds_and_by_picks():
    """4,000 clusters of two kinds are drawn as counts; a jitter far below the spread makes them all different."""
    values = np.arange(4000) % 2.0
    clusters = np.arange(4000)
    jitter = 1e-9 * np.random.default_rng(0).random(4000)
    by_kinds = bootstrap_interval(values, clusters, samples=4000)
    by_picks = bootstrap_interval(values + jitter, clusters, samples=4000)
    half = NormalDist().inv_cdf(0.975) * 0.5 / math.sqrt(4000)
    assert by_kinds == pytest.approx((0.5 - half, 0.5 + half), abs=0.002)
    assert by_picks == pytest.approx((0.5 - half, 0.5 + half), abs=0.002)


def test_bootstrap_over_rows_covers_the_truth_where_pairs_share_rows():
    """Each row has its own chance to win, uniform in [0, 1], and 8 pairs: true accuracy one half.

    400 trials of 95 % miss 20 times give or take 4.4. Wilson's interval, which takes the 320 pairs for independent,
    is too narrow by the root of the design effect, 1 + 7 / 3: it misses about 28 %.
    """
    random, rows = np.random.default_rng(0), np.repeat(np.arange(40), 8)
    missed = wilson_missed = 0
    for _ in range(400):
        wins = random.random(320) < np.repeat(random.random(40), 8)
        low, high = bootstrap_interval(wins, rows, samples=500)
        missed += not low <= 0.5 <= high
        low, high = wilson_interval(wins.sum(), 320)
        wilson_missed += not low <= 0.5 <= high
    assert 8 <= missed <= 36
    assert wilson_missed >= 80


def test_bootstrap_knows_neither_the_order_nor_the_names_of_clusters():
    random = np.random.default_rng(0)
    values, clusters, order = random.random(200), random.integers(0, 30, 200), random.permutation(200)
    expected = bootstrap_interval(values, clusters)
    assert bootstrap_interval(values[order], clusters[order]) == expected
    assert bootstrap_interval(values, [f"row {-c}" for c in clusters]) == expected
    assert bootstrap_interval(values, clusters, seed=1) != expected


def test_bootstrap_knows_no_order_where_sums_are_rounded():
    """1e16 + 1 is 1e16: what a cluster of 1e16, 1 and -1e16 adds up to depends on the order of its values."""
    values, clusters = np.array([1e16, 1.0, -1e16, 4.0]), np.array([0, 0, 0, 1])
    orders = ([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3])
    assert len({bootstrap_interval(values[order], clusters[order]) for order in orders}) == 1


def test_bootstrap_of_a_hundred_thousand_outcomes_takes_under_a_second():
    random = np.random.default_rng(0)
    outcomes, rows = random.integers(0, 3, 100_000) / 2, random.integers(0, 30_000, 100_000)
    start = time.process_time()
    bootstrap_interval(outcomes, rows)
    assert time.process_time() - start < 1


# Accuracy


def test_a_tie_counts_one_half():
    assert accuracy([0.0]) == 0.5
    assert accuracy([1.0, 0.0, -2.0, 0.0]) == 0.5
    assert accuracy_estimate([1.0, 0.0], [0, 1]) == Estimate(0.75, *wilson_interval(1.5, 2), 2, "wilson")


def test_rows_with_several_pairs_are_resampled_if_they_are_not_few():
    margins, rows = np.tile([1.0, 1.0, -1.0], FEW_PROMPTS // 2), np.tile([0, 0, 1], FEW_PROMPTS // 2)
    rows += 2 * np.repeat(np.arange(FEW_PROMPTS // 2), 3)
    found = accuracy_estimate(margins, rows)
    assert (found.value, found.count, found.method) == (2 / 3, 3 * FEW_PROMPTS // 2, "bootstrap over prompts")
    assert (found.low, found.high) == bootstrap_interval(margins > 0, rows)
    few = accuracy_estimate(margins[:-1], rows[:-1])
    value = FEW_PROMPTS / (3 * FEW_PROMPTS // 2 - 1)
    assert few == Estimate(
        value, *wilson_interval(value * (FEW_PROMPTS - 1), FEW_PROMPTS - 1), len(margins) - 1, "wilson over prompts"
    )


@pytest.mark.parametrize("rows", [2, 3, 5, FEW_PROMPTS - 1])
def test_intervals_of_few_rows_hold_the_truth(rows):
    """Ten pairs a row, with a chance to win of the row's own: Beta(4, 2), two thirds on average."""
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        wins = random.random((rows, 10)) < random.beta(4, 2, (rows, 1))
        found = accuracy_estimate(np.where(wins, 1.0, -1.0).ravel(), np.repeat(range(rows), 10))
        held += found.low <= 2 / 3 <= found.high
    assert held >= 0.95 * 400


def test_all_wins_are_not_certain_though_a_bootstrap_would_say_so():
    """Two rows of three wins: as sure as two trials, not as six, and not [1, 1]."""
    rows = [0, 0, 0, 1, 1, 1]
    assert bootstrap_interval(np.ones(6), rows) == (1.0, 1.0)
    found = accuracy_estimate(np.ones(6), rows)
    assert found == Estimate(1.0, *wilson_interval(2, 2), 6, "wilson over prompts")
    assert found.low == pytest.approx(2 / (2 + 3.8415), abs=1e-4)


# Calibration, AUC, distribution


@pytest.mark.parametrize("bins", [1, 3, 10])
@pytest.mark.parametrize("labelled", [False, True])
def test_calibration_equals_a_loop_over_bins_and_pairs(bins, labelled):
    pairs = random_pairs()
    probs = pairs.label_probs if labelled else np.ones(300)
    sure, right = [], []
    for margin, p in zip(pairs.margins.tolist(), probs.tolist(), strict=True):
        sure.append(1 / (1 + math.exp(-abs(margin))))
        right.append(0.5 if margin == 0 else p if margin > 0 else 1 - p)
    ece = 0.0
    for b in range(bins):
        low, high = 0.5 + b / bins / 2, 0.5 + (b + 1) / bins / 2
        members = [i for i, c in enumerate(sure) if low <= c < high or c == high == 1]
        ece += abs(sum(sure[i] for i in members) - sum(right[i] for i in members)) / 300
    found = calibration(pairs.margins, pairs.label_probs if labelled else None, bins)
    assert found.ece == pytest.approx(ece, abs=1e-12)
    assert found.brier == pytest.approx(sum((c - o) ** 2 for c, o in zip(sure, right, strict=True)) / 300)
    assert sum(count for *_, count in found.curve) == 300


def test_rewards_that_are_the_log_odds_of_the_labels_are_calibrated():
    margins = np.random.default_rng(0).normal(0, 2, 1000)
    found = calibration(margins, 1 / (1 + np.exp(-margins)))
    assert found.ece == pytest.approx(0, abs=1e-12)
    assert found.brier == pytest.approx(0, abs=1e-12)


def test_a_label_that_is_probably_wrong_makes_the_rejected_one_right():
    """Margin -ln 3 with the label right by 1/4: confidence 3/4 in the rejected one, which is better by 3/4."""
    assert calibration([-math.log(3)], [0.25]).brier == pytest.approx(0)
    assert calibration([-math.log(3)]).brier == pytest.approx(9 / 16)


def test_ties_and_boundless_margins_are_in_the_first_and_the_last_bin():
    assert calibration([0.0, 1e6, -1e6]).curve == [(0.5, 0.5, 1), (1.0, 0.5, 2)]


def test_auc_equals_a_count_over_all_pairs_of_completions():
    random = np.random.default_rng(0)
    chosen, rejected = random.integers(0, 9, 70) / 3, random.integers(-2, 7, 50) / 3
    wins = sum((c > r) + (c == r) / 2 for c in chosen for r in rejected)
    assert auc(chosen, rejected) == wins / (70 * 50)
    assert auc(rejected, chosen) == 1 - wins / (70 * 50)


def test_auc_differs_from_accuracy_where_prompts_differ():
    """Both pairs are ranked right, (1, 0) and (3, 2), yet 1 is below 2: 3 of 4."""
    assert auc([1.0, 3.0], [0.0, 2.0]) == 0.75
    assert accuracy([1.0, 1.0]) == 1.0


def test_distribution_of_the_numbers_to_a_hundred():
    """Variance of 0 to n is n (n + 2) / 12."""
    found = distribution(np.arange(101)[::-1])
    assert (found.mean, found.median) == (50, 50)
    assert found.std == pytest.approx(math.sqrt(100 * 102 / 12))
    assert (found.q05, found.q25, found.q75, found.q95) == (5, 25, 75, 95)


# Pairs and slices


def test_reference_logps_are_logps_less_reward_over_beta():
    """-10 - 2 / 0.5 = -14 and -6 - 0; -5 - 1 / 0.5 = -7 and -8."""
    pairs = two_pairs()
    assert pairs.ref_logps_chosen.tolist() == [-14.0, -6.0]
    assert pairs.ref_logps_rejected.tolist() == [-7.0, -8.0]
    assert pairs.margins.tolist() == [1.0, -1.0]


def test_lengths_are_similar_up_to_a_tenth_of_the_longer_one():
    """9 of 10, 10 of 10 and 10 of 9 are similar; 89 of 100 and 100 of 89 are not."""
    pairs = random_pairs(5, tokens_chosen=[9, 10, 10, 89, 100], tokens_rejected=[10, 10, 9, 100, 89])
    assert length_classes(pairs).tolist() == ["similar"] * 3 + ["chosen shorter", "chosen longer"]


def test_slices_equal_the_measures_of_their_pairs():
    pairs = random_pairs()
    for part, turns in zip(by(pairs, pairs.turns), (1, 2, 3), strict=True):
        of = pairs.turns == turns
        assert part.name == str(turns)
        assert part.accuracy == accuracy_estimate(pairs.margins[of], pairs.row[of])
        assert part.margin == pytest.approx(pairs.margins[of].mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": []}, "`row` must have shape (T,), T at least 1, got (0,). Pass one entry per pair."),
        (
            {"reward_rejected": [1.0]},
            "`reward_rejected` must have one entry for each of 2 pairs, got 1. Pass as many.",
        ),
        (
            {"reward_chosen": [1.0, math.nan]},
            "`reward_chosen` must hold finite numbers, got nan. Leave out pair 1 or mend it.",
        ),
        (
            {"tokens_chosen": [0, 3]},
            "`tokens_chosen` must hold whole numbers in [1, inf], got 0. Leave out pair 0 or mend it.",
        ),
        ({"turns": [1.5, 2]}, "`turns` must hold whole numbers, got 1.5. Leave out pair 0 or mend it."),
        (
            {"label_probs": [0.5, 1.5]},
            "`label_probs` must hold finite numbers in [0, 1], got 1.5. Leave out pair 1 or mend it.",
        ),
        ({"subset": ["a", None]}, "`subset` must hold strings, got None. Leave out pair 1 or mend it."),
        ({"beta": 0.0}, "`beta` must be above 0, got 0.0. Pass the factor of the rewards."),
        (
            {"kl_rejected": [0.1, 0.2]},
            "`kl_chosen` must be given where the other side's is, got None. Pass both or neither.",
        ),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError) as refused:
        two_pairs(**changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(1, 0), "`count` must be at least 1, got 0. "),
        (lambda: wilson_interval(3, 2), "`wins` must be in [0, 2], got 3. "),
        (lambda: wilson_interval(1, 2, 95), "`confidence` must be between 0 and 1, got 95. "),
        (lambda: bootstrap_interval([1], [1], 1.0), "`confidence` must be between 0 and 1, got 1.0. "),
        (lambda: bootstrap_interval([1], [1], samples=0), "`samples` must be at least 1, got 0. "),
        (lambda: bootstrap_interval([1], [1, 2]), "`clusters` must have one entry for each of 1 pairs, got 2. "),
        (lambda: calibration([1.0], bins=0), "`bins` must be at least 1, got 0. "),
        (lambda: calibration([1.0], [1, 1]), "`label_probs` must have one entry for each of 1 pairs, got 2. "),
        (lambda: auc([], [1.0]), "`chosen` must have shape (T,), T at least 1, got (0,). "),
        (lambda: by(two_pairs(), ["a"]), "`keys` must have one entry for each of 2 pairs, got 1. "),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value).startswith(message)


# The modules of the evaluate library


def test_calibration_module_equals_the_package():
    pairs = random_pairs()
    rewards = {"chosen_rewards": pairs.reward_chosen, "rejected_rewards": pairs.reward_rejected}
    module = evaluate.load(PATHS[2])
    for options in ({}, {"label_probs": pairs.label_probs}, {"bins": 4}):
        expected = calibration(pairs.margins, **options)
        found = module.compute(**rewards, **options)
        assert found == {"expected_calibration_error": expected.ece, "brier_score": expected.brier}


def test_calibration_module_refuses_probabilities_that_do_not_fit():
    module = evaluate.load(PATHS[2])
    with pytest.raises(
        ValueError, match=r"`label_probs` must hold a probability for each of 2 pairs, got \[0.5\]. Pass"
    ):
        module.compute(chosen_rewards=[1.0, 2.0], rejected_rewards=[0.0, 0.0], label_probs=[0.5])


def test_calibration_module_refuses_to_judge_no_pairs():
    with pytest.raises(ValueError, match=r"`chosen_rewards` must hold at least one reward, got none\. Add pairs"):
        evaluate.load(PATHS[2]).compute(chosen_rewards=[], rejected_rewards=[])


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_modules_pool_batches(path):
    whole = evaluate.load(path).compute(chosen_rewards=[1.0, 2.0, 5.0], rejected_rewards=[0.0, 3.0, 1.0])
    module = evaluate.load(path)
    module.add_batch(chosen_rewards=[1.0, 2.0], rejected_rewards=[0.0, 3.0])
    module.add_batch(chosen_rewards=[5.0], rejected_rewards=[1.0])
    assert module.compute() == whole


def test_modules_combine():
    rewards = {"chosen_rewards": [1.0, 2.0, 5.0], "rejected_rewards": [0.0, 3.0, 1.0]}
    single = {key: value for path in PATHS for key, value in evaluate.load(path).compute(**rewards).items()}
    assert evaluate.combine(PATHS).compute(**rewards) == single
    batched = evaluate.combine(PATHS)
    batched.add_batch(**rewards)
    assert batched.compute() == single


def test_example_of_the_calibration_module_is_true(monkeypatch):
    monkeypatch.chdir(MODULES.parent.parent)
    source = (MODULES / NAMES[2] / f"{NAMES[2]}.py").read_text()
    example = doctest.DocTestParser().get_doctest(
        source[: source.index('"""', source.index(">>>"))], {"evaluate": evaluate}, NAMES[2], NAMES[2], 0
    )
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert (runner.tries, runner.failures) == (2, 0)


def test_docstring_examples_of_measures_are_true():
    found = doctest.testmod(measures)
    assert found.attempted >= 11
    assert found.failed == 0
