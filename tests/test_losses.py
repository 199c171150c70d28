"""Every loss against numbers derived by hand, against the oracle, at its limits, and against its own symmetries."""

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch

from qlora_dpo.losses import LOSSES, RANGES, check_range, dpo_loss, loss_parameters
from qlora_dpo.scores import Scores

from loss_oracle import PAIR_LOSSES, STEP_LOSSES, pair_loss, plackett_luce, step_losses

SETTINGS = {
    "sigmoid": {"beta": 0.7, "label_smoothing": 0.15},
    "hinge": {"beta": 0.7},
    "ipo": {"beta": 0.7},
    "exo_pair": {"beta": 0.7, "label_smoothing": 0.15},
    "nca_pair": {"beta": 0.7},
    "robust": {"beta": 0.7, "label_smoothing": 0.15},
    "bco_pair": {"beta": 0.7, "bco_delta": 0.4},
    "sppo_hard": {"beta": 0.7},
    "aot": {"beta": 0.7, "label_smoothing": 0.15},
    "aot_unpaired": {"beta": 0.7, "label_smoothing": 0.15},
    "apo_zero": {"beta": 0.7},
    "apo_down": {"beta": 0.7},
    "discopop": {"beta": 0.7, "discopop_tau": 0.3},
    "sigmoid_norm": {"beta": 0.7},
    "sft": {},
    "simpo": {"beta": 2.5, "simpo_gamma": 0.8},
    "orpo": {"orpo_lambda": 0.4},
    "cpo": {"beta": 0.7, "cpo_alpha": 0.6},
    "dpop": {"beta": 0.7, "dpop_lambda": 3.0},
    "odpo": {"beta": 0.7},
    "plackett_luce": {"beta": 0.7},
}
"""Every hyperparameter of every loss, none at its default."""

OF_LIKELIHOOD = ("sft", "simpo", "orpo", "cpo")
"""Losses that never look at the reference."""

PAIRS = [(0, 1), (2, 1), (4, 3), (1, 3), (0, 3)]
LENGTHS = [3, 7, 1, 4, 2, 5]
"""Six completions: 0, 1 and 3 are shared by several pairs, 5 is in none."""


def scores_of(pi, ref, pairs, lengths=None, group=None, **more):
    w, l = zip(*pairs, strict=True)
    return Scores(
        pi_logps=pi,
        ref_logps=ref,
        yw_idxs=torch.tensor(w),
        yl_idxs=torch.tensor(l),
        lengths=torch.tensor(lengths or [1] * len(pi)),
        group=torch.zeros(len(pi), dtype=torch.long) if group is None else torch.tensor(group),
        **more,
    )


def random_scores(spread=1.0, seed=0, dtype=torch.float64):
    """Scores of PAIRS, with log-ratios of about `spread` nats, pi a leaf."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    ref = -lengths * (0.3 + torch.rand(len(LENGTHS), generator=generator, dtype=dtype))
    pi = (ref + spread * torch.randn(len(LENGTHS), generator=generator, dtype=dtype)).clamp(max=-0.05 * lengths)
    offsets = torch.rand(len(PAIRS), generator=generator, dtype=dtype)
    return scores_of(pi.requires_grad_(), ref, PAIRS, LENGTHS, offsets=offsets)


def sides_of(scores):
    """The pairs as the oracle takes them."""
    offsets = torch.zeros(len(scores.yw_idxs)) if scores.offsets is None else scores.offsets
    return [
        {
            **{"pi_w": scores.pi_logps[w], "pi_l": scores.pi_logps[l]},
            **{"ref_w": scores.ref_logps[w], "ref_l": scores.ref_logps[l]},
            **{"len_w": int(scores.lengths[w]), "len_l": int(scores.lengths[l]), "offset": offset},
        }
        for w, l, offset in zip(scores.yw_idxs.tolist(), scores.yl_idxs.tolist(), offsets, strict=True)
    ]


def oracle(name, scores, beta=1.0, **hyper):
    """`(T,)` losses of the oracle."""
    if name in STEP_LOSSES:
        return step_losses(name, sides_of(scores), beta=beta, **hyper)
    return torch.stack([pair_loss(name, side, beta=beta, **hyper) for side in sides_of(scores)])


def gradient(losses, scores):
    return torch.autograd.grad(losses.sum(), scores.pi_logps)[0]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_every_loss_is_in_the_oracle_and_has_settings_away_from_its_defaults():
    assert set(LOSSES) == set(SETTINGS) == {*PAIR_LOSSES, *STEP_LOSSES, "plackett_luce"}
    for name, settings in SETTINGS.items():
        parameters = loss_parameters(name)
        assert set(settings) == set(parameters), name
        assert all(settings[key] != default for key, default in parameters.items()), name


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_dpo_loss_is_the_papers_listing():
    """Rewards 0.1 * (-10 + 12) = 0.2 and 0.1 * (-20 + 15) = -0.5: loss log(1 + exp(-0.7)) = 0.403186."""
    pi, ref = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -15.0])
    losses, rewards = dpo_loss(pi, ref, torch.tensor([0]), torch.tensor([1]), 0.1)
    assert losses.tolist() == pytest.approx([0.4031860], abs=1e-6)
    assert rewards.tolist() == pytest.approx([0.2, -0.5])


def test_dpo_loss_gives_no_gradient_through_rewards():
    pi = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses, rewards = dpo_loss(pi, torch.zeros(2), torch.tensor([0]), torch.tensor([1]), 0.5)
    assert losses.requires_grad
    assert not rewards.requires_grad


def test_sigmoid_loss_is_dpo_loss():
    scores = random_scores()
    losses, rewards = dpo_loss(scores.pi_logps, scores.ref_logps, scores.yw_idxs, scores.yl_idxs, 0.3)
    assert_close(LOSSES["sigmoid"](scores, beta=0.3), losses)
    assert torch.equal(scores.rewards(0.3), rewards)


def test_label_smoothing_mixes_both_directions():
    """D = 10, beta = 0.1: 0.9 * log(1 + e^-1) + 0.1 * log(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262."""
    scores = scores_of(torch.tensor([5.0, -5.0]), torch.zeros(2), [(0, 1)])
    assert LOSSES["sigmoid"](scores, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.4132617, abs=1e-6)


def test_hinge_by_hand():
    """D = 4 and -4 at beta 0.1: 1 - 0.4 = 0.6 and 1.4; D = 40: 0."""
    scores = scores_of(torch.tensor([2.0, -2.0, 38.0]), torch.zeros(3), [(0, 1), (1, 0), (2, 1)])
    assert LOSSES["hinge"](scores, beta=0.1).tolist() == pytest.approx([0.6, 1.4, 0.0])


def test_odpo_without_offsets_names_the_column():
    with pytest.raises(ValueError, match="Add an `offsets` column"):
        LOSSES["odpo"](scores_of(torch.zeros(2), torch.zeros(2), [(0, 1)]), beta=0.1)


LOG2, ONE = math.log(2), math.log1p(math.exp(-1))
# name, hyperparameters, log pi, log ref, lengths, pairs, offsets, losses
HAND_CHECKS = [
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.3}, [-4, -4], [-1, -1], [1, 1], [(0, 1)], None, [LOG2]),
    ("hinge", {"beta": 0.1}, [4, 0], [0, 0], [1, 1], [(0, 1)], None, [0.6]),
    ("ipo", {"beta": 0.5}, [4, -3], [0, 0], [2, 3], [(0, 1)], None, [4]),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.1}, [0, 0], [0, 0], [1, 1], [(0, 1)], None, [0.510826]),
    ("nca_pair", {"beta": 0.3}, [-2, -5], [-2, -5], [1, 1], [(0, 1)], None, [1.386294]),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, [0, 0], [0, 0], [1, 1], [(0, 1)], None, [LOG2]),
    ("bco_pair", {"beta": 0.5, "bco_delta": 1.0}, [4, 2], [0, 0], [1, 1], [(0, 1)], None, [1.006409]),
    ("sppo_hard", {"beta": 0.5}, [3, 1], [0, 0], [1, 1], [(0, 1)], None, [8]),
    ("aot", {"beta": 1.0}, [3, 0, 1, 0], [0, 0, 2, 0], [1] * 4, [(0, 1), (2, 3)], None, [ONE, ONE]),
    ("aot_unpaired", {"beta": 1.0}, [2, 1, 0, -1], [0] * 4, [1] * 4, [(0, 1), (2, 3)], None, [ONE, ONE]),
    ("apo_zero", {"beta": 0.1}, [-1, -2], [-1, -2], [1, 1], [(0, 1)], None, [1]),
    ("apo_down", {"beta": 0.1}, [-1, -2], [-1, -2], [1, 1], [(0, 1)], None, [1]),
    ("discopop", {"beta": 0.1}, [0, 0], [0, 0], [1, 1], [(0, 1)], None, [0.846574]),
    ("sigmoid_norm", {"beta": 1.0}, [4, 3], [0, 0], [2, 3], [(0, 1)], None, [ONE]),
    ("sft", {}, [-3, -9, -5, -9], [0] * 4, [1, 2, 3, 2], [(0, 1), (2, 3)], None, [1.5, 2.5]),
    ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}, [-2, -6], [0, 0], [2, 3], [(0, 1)], None, [ONE]),
    ("orpo", {"orpo_lambda": 0.1}, [-LOG2, -math.log(3)], [0, 0], [1, 1], [(0, 1)], None, [0.733694]),
    ("cpo", {"beta": 0.1, "cpo_alpha": 1.0}, [-4, -4], [0, 0], [2, 1], [(0, 1)], None, [2.693147]),
    ("dpop", {"beta": 0.1, "dpop_lambda": 5.0}, [-2, -12], [0, 0], [1, 1], [(0, 1)], None, [LOG2]),
    ("odpo", {"beta": 0.1}, [20, 0], [0, 0], [1, 1], [(0, 1)], [1.0], [ONE]),
    ("plackett_luce", {"beta": 0.1}, [0] * 3, [0] * 3, [1] * 3, [(0, 1), (0, 2), (1, 2)], None, [1.791759 / 3] * 3),
]


@pytest.mark.parametrize(
    ("name", "hyper", "pi", "ref", "lengths", "pairs", "offsets", "expected"),
    HAND_CHECKS,
    ids=[check[0] for check in HAND_CHECKS],
)
def test_hand_check_of_the_docstring(name, hyper, pi, ref, lengths, pairs, offsets, expected):
    pi, ref = torch.tensor(pi, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
    offsets = None if offsets is None else torch.tensor(offsets, dtype=torch.float64)
    found = LOSSES[name](scores_of(pi, ref, pairs, lengths, offsets=offsets), **hyper)
    assert found.tolist() == pytest.approx(expected, abs=5e-7)
    assert "Hand check" in LOSSES[name].__doc__


def test_every_loss_has_a_hand_check():
    assert [check[0] for check in HAND_CHECKS] == list(LOSSES)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.5, 15.0])
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_each_pair_has_the_value_and_gradient_of_the_oracle(name, spread):
    for seed in range(3):
        scores = random_scores(spread, seed)
        found, expected = LOSSES[name](scores, **SETTINGS[name]), oracle(name, scores, **SETTINGS[name])
        assert_close(found, expected)
        for mine, other in zip(found, expected, strict=True):
            (grad,) = torch.autograd.grad(mine, scores.pi_logps, retain_graph=True)
            (other_grad,) = torch.autograd.grad(other, scores.pi_logps, retain_graph=True)
            assert_close(grad, other_grad)


@pytest.mark.parametrize("spread", [0.5, 15.0])
@pytest.mark.parametrize("name", sorted(STEP_LOSSES))
def test_a_step_of_coupled_pairs_has_the_mean_and_gradient_of_the_oracle(name, spread):
    for seed in range(3):
        scores = random_scores(spread, seed)
        found, expected = LOSSES[name](scores, **SETTINGS[name]), oracle(name, scores, **SETTINGS[name])
        assert found.shape == (len(PAIRS),)
        assert_close(found.mean(), expected.mean())
        assert_close(gradient(found, scores), gradient(expected, scores))


GROUPS = [[0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 1, 0, 1, 0, 1, 1, 2, 2]]
"""Groups of two, four and three completions, and groups of three, four and two that are not next to each other."""


@pytest.mark.parametrize("partial", [False, True], ids=["all-pairs", "partial-pairs"])
@pytest.mark.parametrize("group", GROUPS)
def test_plackett_luce_is_the_oracles_mean_over_unequal_groups(group, partial):
    generator = torch.Generator().manual_seed(3)
    pi = (4 * torch.randn(9, generator=generator, dtype=torch.float64)).requires_grad_()
    ref = torch.randn(9, generator=generator, dtype=torch.float64)
    members = [[i for i, g in enumerate(group) if g == k] for k in range(3)]
    beats = [list(itertools.combinations(reversed(one), 2)) for one in members]
    if partial:  # the last one against every second, and against the first
        beats = [[pair for pair in pairs if sum(pair) % 2 or pair == pairs[0]] for pairs in beats]
    assert len({len(pairs) for pairs in beats}) > 1
    scores = scores_of(pi, ref, [pair for pairs in beats for pair in pairs], group=group)
    found = LOSSES["plackett_luce"](scores, beta=0.7)
    expected = torch.stack([plackett_luce(pi - ref, pairs, 0.7) for pairs in beats])
    assert_close(found.sum() / 3, expected.mean())
    assert_close(gradient(found, scores), gradient(expected, scores))
    for pairs, mine, other in zip(beats, found.split([len(pairs) for pairs in beats]), expected, strict=True):
        assert_close(mine, (other / len(pairs)).expand(len(pairs)))


def test_plackett_luce_of_single_pairs_is_dpo():
    pi = torch.randn(4, dtype=torch.float64)
    scores = scores_of(pi, torch.zeros(4, dtype=torch.float64), [(1, 0), (2, 3)], group=[0, 0, 1, 1])
    assert_close(LOSSES["plackett_luce"](scores, beta=0.7), LOSSES["sigmoid"](scores, beta=0.7))


def test_a_group_without_a_pair_adds_nothing_to_plackett_luce():
    pi = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scores = scores_of(pi, torch.zeros(5, dtype=torch.float64), [(1, 0), (3, 4)], group=[0, 0, 1, 2, 2])
    losses = LOSSES["plackett_luce"](scores, beta=0.7)
    assert_close(losses, LOSSES["sigmoid"](scores, beta=0.7))
    assert gradient(losses, scores)[2] == 0


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_a_shared_completions_gradient_is_the_sum_over_its_pairs(name):
    scores = random_scores(4.0)
    whole = gradient(LOSSES[name](scores, **SETTINGS[name]), scores)
    summed = torch.zeros_like(whole)
    for t in range(len(PAIRS)):
        pair = slice(t, t + 1)
        one = replace(scores, yw_idxs=scores.yw_idxs[pair], yl_idxs=scores.yl_idxs[pair], offsets=scores.offsets[pair])
        summed += gradient(LOSSES[name](one, **SETTINGS[name]), one)
    assert_close(whole, summed)
    assert whole[5] == 0


@pytest.mark.parametrize("name", sorted(STEP_LOSSES))
def test_a_shared_completions_gradient_is_the_sum_over_its_copies(name):
    scores = random_scores(4.0)
    whole = gradient(LOSSES[name](scores, **SETTINGS[name]), scores)
    both, pairs = torch.cat((scores.yw_idxs, scores.yl_idxs)), torch.arange(len(PAIRS))
    copies = replace(
        scores,
        pi_logps=scores.pi_logps.detach()[both].requires_grad_(),
        ref_logps=scores.ref_logps[both],
        yw_idxs=pairs,
        yl_idxs=pairs + len(pairs),
        lengths=scores.lengths[both],
    )
    of_copies = gradient(LOSSES[name](copies, **SETTINGS[name]), copies)
    assert_close(whole, torch.zeros_like(whole).index_add(0, both, of_copies))


# ---- limits ----------------------------------------------------------------------------------------------------------

LOG_RATIOS = list(itertools.product((0.0, 50.0, -50.0, 2000.0, -2000.0), repeat=2))
LOG_PROBS = list(itertools.product((0.0, -50.0, -2000.0), repeat=2))
AT_DEFAULTS = {name: {"beta": 0.1} for name in LOSSES} | {
    **{"exo_pair": {"beta": 0.1, "label_smoothing": 0.001}, "sft": {}, "orpo": {}},
    **{"simpo": {"beta": 10.0}},
}


def assert_finite(name, dtype, pi, pairs, group, hyper):
    pi = torch.tensor(pi, dtype=dtype, requires_grad=True)
    offsets = torch.ones(len(pairs), dtype=dtype)
    scores = scores_of(pi, torch.zeros_like(pi), pairs, group=group, offsets=offsets)
    losses = LOSSES[name](scores, **hyper)
    assert losses.dtype == dtype
    assert torch.isfinite(losses).all(), (pi, losses)
    assert torch.isfinite(gradient(losses, scores)).all(), pi


@pytest.mark.parametrize("hyper", [AT_DEFAULTS, SETTINGS], ids=["defaults", "settings"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_values_on_either_side_stay_finite(name, dtype, hyper):
    combinations = LOG_PROBS if name in OF_LIKELIHOOD else LOG_RATIOS
    for both in combinations:
        assert_finite(name, dtype, both, [(0, 1)], [0, 0], hyper[name])
    together = [(2 * i, 2 * i + 1) for i in range(len(combinations))]
    groups = [i // 2 for i in range(2 * len(combinations))]
    assert_finite(name, dtype, [value for both in combinations for value in both], together, groups, hyper[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_within_one_ranking_stay_finite(dtype):
    for values in itertools.permutations((0.0, 50.0, -50.0, 2000.0, -2000.0)):
        pairs = list(itertools.combinations(range(5), 2))
        assert_finite("plackett_luce", dtype, values, pairs, [0] * 5, {"beta": 1.0})


@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_discopop_stays_finite_where_its_exponential_would_overflow(beta, tau):
    for dtype, both in itertools.product((torch.float32, torch.float64), LOG_RATIOS):
        assert_finite("discopop", dtype, both, [(0, 1)], [0, 0], {"beta": beta, "discopop_tau": tau})


def test_orpo_stays_finite_next_to_certainty():
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).eps
        for both in itertools.product((0.0, -tiny / 4, -tiny, -2 * tiny, -1e-3), repeat=2):
            assert_finite("orpo", dtype, both, [(0, 1)], [0, 0], {"orpo_lambda": 1.0})


# ---- symmetries ------------------------------------------------------------------------------------------------------

OTHER_LABEL = {
    "sigmoid": {"beta": 0.7, "label_smoothing": 0.85},
    "hinge": {"beta": -0.7},
    "ipo": {"beta": -0.7},
    "exo_pair": {"beta": 0.7, "label_smoothing": 0.85},
    "robust": {"beta": 0.7, "label_smoothing": 0.85},
    "bco_pair": {"beta": -0.7, "bco_delta": -0.4},
    "sppo_hard": {"beta": -0.7},
    "aot": {"beta": 0.7, "label_smoothing": 0.85},
    "aot_unpaired": {"beta": 0.7, "label_smoothing": 0.85},
    "apo_zero": {"beta": -0.7},
    "discopop": {"beta": -0.7, "discopop_tau": 0.3},
    "sigmoid_norm": {"beta": -0.7},
    "simpo": {"beta": -2.5, "simpo_gamma": 0.8},
    "odpo": {"beta": -0.7},
}
"""Hyperparameters with which the formula of SETTINGS is that of the exchanged pair: 1 - e, or rewards with -beta."""
NO_OTHER_LABEL = {"nca_pair", "apo_down", "dpop", "orpo", "cpo", "sft", "plackett_luce"}
"""Losses whose exchanged pair no hyperparameter describes."""


def test_every_loss_has_a_formula_of_the_other_label_or_is_listed_without():
    assert set(OTHER_LABEL) == set(LOSSES) - NO_OTHER_LABEL


@pytest.mark.parametrize("name", sorted(OTHER_LABEL))
def test_exchanging_the_sides_gives_the_loss_of_the_other_label(name):
    scores = random_scores(3.0)
    exchanged = replace(scores, yw_idxs=scores.yl_idxs, yl_idxs=scores.yw_idxs)
    found = LOSSES[name](exchanged, **SETTINGS[name])
    expected = oracle(name, scores, **OTHER_LABEL[name])
    if name == "aot":  # the quantiles come in the other order
        expected = expected.flip(0)
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))
    assert not torch.allclose(found, LOSSES[name](scores, **SETTINGS[name]))


CONSTANT_CANCELS = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "odpo", "aot", "plackett_luce"}
"""Unchanged by a constant on the policy's log-probs of a prompt, whatever the completions' lengths."""
CANCELS_OVER_THE_STEP = {"aot_unpaired"}
"""Unchanged by one constant on all, changed by one for each prompt: it compares completions of different prompts."""
CONSTANT_PER_TOKEN_CANCELS = {"ipo", "sigmoid_norm", "simpo"}
"""Unchanged by a constant on every token's log-prob."""
CONSTANT_MATTERS = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop", "sft", "orpo", "cpo"}


def test_every_loss_is_listed_by_what_a_constant_does():
    lists = (CONSTANT_CANCELS, CANCELS_OVER_THE_STEP, CONSTANT_PER_TOKEN_CANCELS, CONSTANT_MATTERS)
    assert sorted(LOSSES) == sorted(name for names in lists for name in names)


def unchanged_by(shift):
    """The losses whose value stays when `shift` of the scores is taken from the policy's log-probs."""
    group = [0, 0, 0, 1, 1, 1]
    pi, ref = torch.randn(6, dtype=torch.float64) * 3 - 30, torch.randn(6, dtype=torch.float64) * 3 - 30
    scores = scores_of(pi, ref, [(0, 1), (0, 2), (4, 3), (5, 3)], LENGTHS, group, offsets=torch.rand(4).double())
    shifted = replace(scores, pi_logps=pi - shift(scores))
    return {
        name
        for name, loss in LOSSES.items()
        if torch.allclose(loss(scores, **SETTINGS[name]), loss(shifted, **SETTINGS[name]), rtol=1e-12, atol=1e-12)
    }


def test_a_constant_on_all_log_probs_changes_only_the_losses_of_single_completions():
    torch.manual_seed(0)
    assert unchanged_by(lambda scores: 1.5) == CONSTANT_CANCELS | CANCELS_OVER_THE_STEP


def test_a_constant_for_each_prompt_changes_the_loss_that_compares_prompts():
    torch.manual_seed(0)
    assert unchanged_by(lambda scores: torch.tensor([1.5, 0.25])[scores.group]) == CONSTANT_CANCELS


def test_a_constant_on_every_token_changes_all_but_the_losses_of_averages():
    torch.manual_seed(0)
    assert unchanged_by(lambda scores: 1.5 * scores.lengths) == CONSTANT_PER_TOKEN_CANCELS


def test_only_the_losses_of_likelihoods_ignore_the_reference():
    scores = random_scores()
    moved = replace(scores, ref_logps=scores.ref_logps + torch.arange(6.0))
    ignoring = {
        name
        for name, loss in LOSSES.items()
        if torch.equal(loss(scores, **SETTINGS[name]), loss(moved, **SETTINGS[name]))
    }
    assert ignoring == set(OF_LIKELIHOOD)


@pytest.mark.parametrize("name", ["sft", "orpo", "cpo"])
def test_likelihood_terms_take_the_log_probs_that_no_modifier_changed(name):
    """With pi_logps changed, the gradient to `likelihood_logps` is that of the NLL term alone: -c on the chosen."""
    scores = random_scores()
    likelihood = scores.pi_logps.detach().clone().requires_grad_()
    changed = replace(scores, pi_logps=scores.pi_logps.detach() - 1.0, likelihood_logps=likelihood)
    losses = LOSSES[name](changed, **SETTINGS[name])
    (found,) = torch.autograd.grad(losses.sum(), likelihood)
    tokens = scores.lengths[scores.yw_idxs]
    share = {"sft": len(PAIRS) / tokens.sum().double(), "orpo": 1 / tokens.double(), "cpo": 0.6 / tokens.double()}
    slopes = -share[name].expand(len(PAIRS))
    assert_close(found, torch.zeros_like(found).index_add(0, scores.yw_idxs, slopes))


# ---- hyperparameters -------------------------------------------------------------------------------------------------

OUTSIDE = {
    "beta": [0.0, -0.1],
    "label_smoothing": [-1e-9, 0.5, 0.9],
    "discopop_tau": [0.0, -0.05, 1 + 1e-9],
    "simpo_gamma": [-1e-9],
    "orpo_lambda": [0.0, -0.1],
    "cpo_alpha": [-1e-9],
    "dpop_lambda": [-1e-9],
    "bco_delta": [math.inf, -math.inf],
}
INSIDE = {
    "beta": [1e-9, 100.0],
    "label_smoothing": [0.0, 0.5 - 1e-9],
    "discopop_tau": [1e-9, 1.0],
    "simpo_gamma": [0.0, 10.0],
    "orpo_lambda": [1e-9, 10.0],
    "cpo_alpha": [0.0, 10.0],
    "dpop_lambda": [0.0, 500.0],
    "bco_delta": [-5.0, 0.0, 5.0],
}


def takers(parameter):
    return [name for name in LOSSES if parameter in loss_parameters(name)]


def test_every_range_has_values_inside_and_outside_and_a_loss_that_takes_it():
    assert set(OUTSIDE) == set(INSIDE) == set(RANGES)
    assert all(takers(parameter) for parameter in RANGES)
    assert {key for name in LOSSES for key in loss_parameters(name)} == set(RANGES)


@pytest.mark.parametrize(
    ("parameter", "value"), [(key, value) for key, values in OUTSIDE.items() for value in (*values, math.nan)]
)
def test_a_value_outside_its_range_is_refused_by_name(parameter, value):
    message = rf"`{parameter}` must be .*, got {value}\. "
    with pytest.raises(ValueError, match=message):
        check_range(parameter, value)
    for name in takers(parameter):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](random_scores(), **{**SETTINGS[name], parameter: value})


@pytest.mark.parametrize("parameter", sorted(set(RANGES) - {"bco_delta", "label_smoothing", "discopop_tau"}))
def test_an_infinite_hyperparameter_is_refused_by_name(parameter):
    """An infinite factor of 0 is NaN, and log-ratios are 0 at the first step; an infinite term is an infinite loss."""
    with pytest.raises(ValueError, match=f"`{parameter}` must be"):
        check_range(parameter, math.inf)


@pytest.mark.parametrize(("parameter", "value"), [(key, value) for key, values in INSIDE.items() for value in values])
def test_values_up_to_the_ends_of_a_range_are_accepted(parameter, value):
    check_range(parameter, value)
    for name in takers(parameter):
        if (name, value) != ("exo_pair", 0.0):  # its divergence from a certain label is infinite
            assert torch.isfinite(LOSSES[name](random_scores(), **{**SETTINGS[name], parameter: value})).all(), name


def test_exo_pair_refuses_a_certain_label():
    with pytest.raises(ValueError, match="`label_smoothing` must be above 0 for loss_type='exo_pair', got 0"):
        LOSSES["exo_pair"](random_scores(), beta=0.1, label_smoothing=0.0)


def test_loss_parameters_are_fields_of_the_config_with_its_defaults():
    from qlora_dpo import QLoRADPOConfig

    fields = QLoRADPOConfig.__dataclass_fields__
    for name in LOSSES:
        for key, default in loss_parameters(name).items():
            if key == "bco_delta":  # a running mean, never an option
                assert key not in fields
                continue
            assert key in fields
            assert default in (inspect.Parameter.empty, fields[key].default)
