"""What surrounds a loss: modifiers against the oracle, weights, probabilities of labels, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from qlora_dpo import QLoRADPOConfig
from qlora_dpo.losses import LOSSES, loss_parameters
from qlora_dpo.objective import (
    AGAINST_REFERENCE,
    DIVERGENCES,
    NOT_OF_PAIRS,
    ON_DIFFERENCES,
    POOLED,
    TWO_SIDED,
    WITHOUT_REFERENCE,
    Objective,
    RunningMean,
    check_columns,
    check_reference,
    desensitized,
    divergence_scores,
    flipped,
    make_objective,
    on_policy_weights,
)
from qlora_dpo.scores import Scores, scores_of_sides, sides_table

from loss_oracle import STEP_LOSSES, divergence_score, ld_logps, pair_loss, step_losses, wpo_weight

DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "orpo_lambda": 0.1,
    "cpo_alpha": 1.0,
    "dpop_lambda": 50.0,
}
"""The hyperparameters as the config hands them over, all of them whatever the loss."""

SETTINGS = {
    "beta": 0.7,
    "label_smoothing": 0.15,
    "discopop_tau": 0.3,
    "simpo_gamma": 0.8,
    "orpo_lambda": 0.4,
    "cpo_alpha": 0.6,
    "dpop_lambda": 3.0,
}

PAIRS = [(0, 1), (2, 1), (4, 3), (1, 3), (3, 0)]
LENGTHS = [3, 7, 1, 4, 2, 5]
"""Completions 0, 1 and 3 are shared: 1 meets a side of 3, of 1 and of 4 tokens. Completion 5 is in no pair."""


def token_scores(seed=0, dtype=torch.float64, spread=0.5, **more):
    """Scores of PAIRS with token values; pi_token_logps is the leaf."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)

    def sums(tokens):
        return torch.stack([run.sum() for run in tokens.split(LENGTHS)])

    ref = -0.8 - torch.rand(count, generator=generator, dtype=dtype)
    pi = (ref + spread * torch.randn(count, generator=generator, dtype=dtype)).clamp(max=-0.05).requires_grad_()
    log_sum_sq = -0.5 - torch.rand(count, generator=generator, dtype=dtype)
    w, l = zip(*PAIRS, strict=True)
    return Scores(
        pi_logps=sums(pi),
        ref_logps=sums(ref),
        yw_idxs=torch.tensor(w),
        yl_idxs=torch.tensor(l),
        lengths=torch.tensor(LENGTHS),
        group=torch.zeros(len(LENGTHS), dtype=torch.long),
        offsets=torch.rand(len(PAIRS), generator=generator, dtype=dtype),
        pi_token_logps=pi,
        ref_token_logps=ref,
        pi_log_sum_sq_probs=log_sum_sq,
        **more,
    )


def objective_of(*names, weights=None, **options):
    """The objective with those of SETTINGS that its losses take."""
    taken = {key for name in names for key in loss_parameters(name)}
    values = {**DEFAULTS, **{key: value for key, value in SETTINGS.items() if key in taken}}
    return make_objective(names, weights, values, **options)


def oracle(name, scores, ld_alpha=None, divergence="reverse_kl", coef=0.5):
    """`(T,)` losses of the oracle, modifiers and all, from token values."""
    if name == "sft":  # of likelihoods, which no modifier changes
        ld_alpha, divergence = None, "reverse_kl"
    pi, ref = scores.pi_token_logps.split(LENGTHS), scores.ref_token_logps.split(LENGTHS)
    sides = []
    for (w, l), offset in zip(PAIRS, scores.offsets, strict=True):
        alpha = 1.0 if ld_alpha is None else ld_alpha
        values = (*ld_logps(pi[w], pi[l], alpha), *ld_logps(ref[w], ref[l], alpha))
        pi_w, pi_l, ref_w, ref_l = values
        if divergence != "reverse_kl":
            pi_w, pi_l = (divergence_score(divergence, h, coef) for h in (pi_w - ref_w, pi_l - ref_l))
            ref_w = ref_l = torch.zeros_like(pi_w)
        side = {"pi_w": pi_w, "pi_l": pi_l, "ref_w": ref_w, "ref_l": ref_l, "offset": offset}
        sides.append(side | {"len_w": LENGTHS[w], "len_l": LENGTHS[l]})
    hyper = {key: SETTINGS[key] for key in loss_parameters(name) if key in SETTINGS and key != "beta"}
    if name in STEP_LOSSES:
        return step_losses(name, sides, beta=SETTINGS["beta"], **hyper)
    return torch.stack([pair_loss(name, side, beta=SETTINGS["beta"], **hyper) for side in sides])


def gradient(losses, scores):
    """d(sum of losses) / d(token log-prob), `(N,)`."""
    return torch.autograd.grad(losses.sum(), scores.pi_token_logps, retain_graph=True)[0]


def assert_close(found, expected, rtol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-14)


def assert_same_step(found, expected, scores):
    """Equal in mean and gradient, which is all of coupled losses; equal for each pair is checked where it holds."""
    assert_close(found.mean(), expected.mean())
    assert_close(gradient(found, scores), gradient(expected, scores))


# ---- f-divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.999, 1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_scores_have_the_value_and_gradient_of_the_oracle(kind, alpha):
    h = torch.linspace(-20, 20, 41, dtype=torch.float64, requires_grad=True)
    found, expected = divergence_scores(h, kind, alpha), divergence_score(kind, h, alpha)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sum(), h)[0], torch.autograd.grad(expected.sum(), h)[0])


def test_divergence_scores_by_hand():
    """At h = -log 3, pi / ref = 1/3: 1 - 3; log(2/3 / (4/3)); (3^(1/2) - 1) / (-1/2); and log(1/3) itself."""
    h = torch.tensor([-math.log(3), 0.0], dtype=torch.float64)
    expected = {
        "reverse_kl": -math.log(3),
        "forward_kl": -2.0,
        "js_divergence": -math.log(2),
        "alpha_divergence": -2 * (math.sqrt(3) - 1),
    }
    for kind in DIVERGENCES:
        assert divergence_scores(h, kind, 0.5).tolist() == pytest.approx([expected[kind], 0.0], abs=1e-15)


def test_the_alpha_divergence_tends_to_the_log_ratio():
    h = torch.linspace(-5, 5, 11, dtype=torch.float64)
    assert torch.equal(divergence_scores(h, "alpha_divergence", 1.0), h)
    for step in (1e-7, -1e-7, 1e-5, -1e-5):
        found = divergence_scores(h, "alpha_divergence", 1 + step)
        torch.testing.assert_close(found, h, rtol=1e-4, atol=0)
        rtol = 1e-6 if abs(step) < 1e-6 else 1e-10  # closer than 1e-6, the limit itself is taken
        assert_close(found, divergence_score("alpha_divergence", h, 1 + step), rtol)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_scores_of_huge_log_ratios_are_finite_with_finite_gradient(kind, dtype, alpha):
    h = torch.tensor([0.0, 50.0, -50.0, 90.0, -90.0, 2000.0, -2000.0, 1e5, -1e5], dtype=dtype, requires_grad=True)
    found = divergence_scores(h, kind, alpha)
    assert torch.isfinite(found).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), h)[0]).all()
    assert found[h.detach().argsort()].diff().min() >= 0  # f' rises


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("name", [*ON_DIFFERENCES, "sft"])
def test_losses_of_divergences_have_the_value_and_gradient_of_the_oracle(name, kind):
    scores = token_scores()
    coef = 0.3 if kind == "alpha_divergence" else 0.5
    found = objective_of(name, f_divergence_type=kind, f_alpha_divergence_coef=coef)(scores)
    expected = oracle(name, scores, divergence=kind, coef=coef)
    assert_same_step(found, expected, scores)
    if name != "sft":
        assert_close(found, expected)
        assert not torch.allclose(found, objective_of(name)(scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_losses_of_divergences_stay_finite_at_huge_log_ratios(name, kind, dtype):
    objective = objective_of(name, f_divergence_type=kind)
    for chosen in (0.0, 50.0, -50.0, 2000.0, -2000.0):
        for rejected in (0.0, 50.0, -50.0, 2000.0, -2000.0):
            pi = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
            index = torch.tensor([0]), torch.tensor([1])
            lengths, group = torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
            losses = objective(Scores(pi, 0 * pi.detach(), *index, lengths, group, offsets=torch.ones(1, dtype=dtype)))
            assert torch.isfinite(losses).all(), (chosen, rejected)
            assert torch.isfinite(torch.autograd.grad(losses.sum(), pi)[0]).all(), (chosen, rejected)


# ---- length desensitisation ------------------------------------------------------------------------------------------

WITH_LENGTHS_CUT = sorted(set(LOSSES) - {"plackett_luce", "orpo", "simpo", "cpo"})


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", WITH_LENGTHS_CUT)
def test_desensitised_losses_have_the_value_and_token_gradient_of_the_oracle(name, ld_alpha):
    scores = token_scores()
    found, expected = objective_of(name, ld_alpha=ld_alpha)(scores), oracle(name, scores, ld_alpha)
    assert_same_step(found, expected, scores)
    if name not in STEP_LOSSES:
        assert_close(found, expected)
    changed = not torch.allclose(found, objective_of(name)(scores), rtol=1e-12, atol=0)
    assert changed == (ld_alpha != 1 and name != "sft")  # a likelihood counts every token


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_without_a_reference_the_comparison_is_desensitised_and_the_likelihood_is_not(name):
    scores = token_scores()
    runs = scores.pi_token_logps.split(LENGTHS)
    expected = []
    for w, l in PAIRS:
        pi_w, pi_l = ld_logps(runs[w], runs[l], 0.3)
        if name == "simpo":
            side = {"pi_w": pi_w, "pi_l": pi_l, "len_w": LENGTHS[w], "len_l": LENGTHS[l]}
            expected.append(pair_loss("simpo", side, beta=0.7, simpo_gamma=0.8))
        else:
            likelihood = -0.6 * runs[w].mean()
            expected.append(torch.log1p(torch.exp(-0.7 * (pi_w - pi_l))) + likelihood)
    expected = torch.stack(expected)
    found = objective_of(name, ld_alpha=0.3)(scores)
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


def test_a_completion_is_cut_at_each_partners_length():
    """Completion 1 has 7 tokens and meets sides of 3, of 1 and of 4 tokens: three values."""
    scores = token_scores()
    cut = desensitized(scores, 0.25)
    runs, refs = scores.pi_token_logps.split(LENGTHS), scores.ref_token_logps.split(LENGTHS)
    both = [w for w, _ in PAIRS] + [l for _, l in PAIRS]
    others = [l for _, l in PAIRS] + [w for w, _ in PAIRS]
    for values, tokens in ((cut.pi_logps, runs), (cut.ref_logps, refs)):
        expected = [
            tokens[a][: LENGTHS[b]].sum() + 0.25 * tokens[a][LENGTHS[b] :].sum()
            for a, b in zip(both, others, strict=True)
        ]
        assert_close(values, torch.stack(expected))
    of_one = [cut.pi_logps[i].item() for i, a in enumerate(both) if a == 1]
    assert len(set(of_one)) == 3
    assert_close(cut.log_likelihoods, scores.pi_logps[both])
    assert cut.lengths.tolist() == [LENGTHS[i] for i in both]


def test_desensitised_log_probs_by_hand():
    """Token log-probs -1, -2, -4 against a side of one token: -1 - 6 / 2 = -4; the side of one token keeps its -3."""
    pi = torch.tensor([-1.0, -2.0, -4.0, -3.0])
    scores = Scores(
        pi_logps=torch.tensor([-7.0, -3.0]),
        ref_logps=torch.zeros(2),
        yw_idxs=torch.tensor([0]),
        yl_idxs=torch.tensor([1]),
        lengths=torch.tensor([3, 1]),
        group=torch.zeros(2, dtype=torch.long),
        pi_token_logps=pi,
        ref_token_logps=torch.zeros(4),
    )
    assert desensitized(scores, 0.5).pi_logps.tolist() == [-4.0, -3.0]


def test_desensitisation_needs_the_references_token_values():
    scores = replace(token_scores(), ref_token_logps=None)
    with pytest.raises(ValueError, match=r"`ld_alpha` must be None with given `ref_logps`, got 0.5: .* Drop one"):
        objective_of("sigmoid", ld_alpha=0.5)(scores)


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("name", [*ON_DIFFERENCES, "sft"])
def test_a_divergence_of_desensitised_log_ratios_is_that_of_the_oracle(name, kind):
    scores = token_scores()
    found = objective_of(name, f_divergence_type=kind, ld_alpha=0.3)(scores)
    assert_same_step(found, oracle(name, scores, 0.3, kind), scores)


# ---- weights of pairs ------------------------------------------------------------------------------------------------

WEIGHABLE = sorted(set(LOSSES) - set(NOT_OF_PAIRS))


def oracle_weights(scores):
    pi, squares = scores.pi_token_logps.split(LENGTHS), scores.pi_log_sum_sq_probs.split(LENGTHS)
    return torch.stack([wpo_weight(pi[w], squares[w], pi[l], squares[l]) for w, l in PAIRS])


def test_on_policy_weights_are_those_of_the_oracle_and_carry_no_gradient():
    scores = token_scores()
    weights = on_policy_weights(scores)
    assert_close(weights, oracle_weights(scores))
    assert not weights.requires_grad
    assert weights.std() > 0.1


def test_on_policy_weights_carry_no_gradient_to_the_squared_probabilities():
    scores = token_scores()
    scores = replace(scores, pi_log_sum_sq_probs=scores.pi_log_sum_sq_probs.requires_grad_())
    assert not on_policy_weights(scores).requires_grad


def test_on_policy_weights_by_hand():
    """Two tokens of p = 1/2 among two give 1; p = 3/4 of (3/4, 1/4) gives 3/4 / (5/8) = 6/5: 1 * 6/5."""
    logs = torch.log(torch.tensor([1 / 2, 1 / 2, 3 / 4], dtype=torch.float64))
    squares = torch.log(torch.tensor([1 / 2, 1 / 2, 5 / 8], dtype=torch.float64))
    scores = Scores(
        pi_logps=torch.stack((logs[:2].sum(), logs[2])),
        ref_logps=torch.zeros(2),
        yw_idxs=torch.tensor([0]),
        yl_idxs=torch.tensor([1]),
        lengths=torch.tensor([2, 1]),
        group=torch.zeros(2, dtype=torch.long),
        pi_token_logps=logs,
        pi_log_sum_sq_probs=squares,
    )
    assert on_policy_weights(scores).tolist() == pytest.approx([6 / 5])


@pytest.mark.parametrize("name", WEIGHABLE)
def test_weighted_losses_are_the_losses_times_the_oracles_weights(name):
    scores = token_scores()
    plain, found = objective_of(name)(scores), objective_of(name, use_weighting=True)(scores)
    expected = oracle_weights(scores) * plain
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


def test_weighting_asks_for_the_squared_probabilities_and_nothing_else_does():
    assert objective_of("sigmoid", use_weighting=True).statistics == ("log_sum_sq_probs",)
    assert objective_of("sigmoid", ld_alpha=0.5).statistics == ()


def test_weighting_takes_the_tokens_that_desensitisation_counts_less():
    """The weight is of whole completions, the loss of cut ones."""
    scores = token_scores()
    found = objective_of("sigmoid", use_weighting=True, ld_alpha=0.3)(scores)
    expected = oracle_weights(scores) * oracle("sigmoid", scores, 0.3)
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


GIVEN = torch.tensor([2.0, 0.0, 0.5, 3.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_given_weights_multiply_each_loss_and_do_not_renormalise(name):
    scores = token_scores()
    plain, found = objective_of(name)(scores), objective_of(name)(replace(scores, weights=GIVEN))
    assert_close(found, GIVEN * plain)
    assert_close(gradient(found, scores), gradient(GIVEN * plain, scores))
    doubled = objective_of(name)(replace(scores, weights=2 * torch.ones_like(GIVEN)))
    assert_close(doubled.mean(), 2 * plain.mean())


def test_given_and_on_policy_weights_multiply():
    scores = replace(token_scores(), weights=GIVEN)
    found = objective_of("sigmoid", use_weighting=True)(scores)
    assert_close(found, GIVEN * oracle_weights(scores) * oracle("sigmoid", scores))


# ---- several losses, probabilities of labels, offsets ----------------------------------------------------------------


def test_mixed_preference_optimisation_is_the_weighted_sum_of_its_losses():
    scores = token_scores()
    found = objective_of("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.0])(scores, 0.4)
    plain = {
        "sigmoid": oracle("sigmoid", scores),
        "bco_pair": objective_of("bco_pair")(scores, 0.4),
        "sft": oracle("sft", scores),
    }
    expected = 0.8 * plain["sigmoid"] + 0.2 * plain["bco_pair"] + plain["sft"]
    assert_same_step(found, expected, scores)


def test_the_delta_of_bco_reaches_bco_alone():
    scores = token_scores()
    for name in sorted(set(LOSSES) - {"bco_pair"}):
        assert torch.equal(objective_of(name)(scores, 0.4), objective_of(name)(scores))
    sides = {"pi": scores.pi_logps, "ref": scores.ref_logps}
    expected = [
        pair_loss(
            "bco_pair",
            {f"{key}_{side}": value[i] for key, value in sides.items() for side, i in (("w", w), ("l", l))},
            beta=0.7,
            bco_delta=0.4,
        )
        for w, l in PAIRS
    ]
    assert_close(objective_of("bco_pair")(scores, 0.4), torch.stack(expected))


@pytest.mark.parametrize("pair", [("sigmoid", "cpo"), ("ipo", "sft"), ("aot", "nca_pair"), ("discopop", "orpo")])
def test_two_losses_sum_with_their_weights_and_with_one_each_by_default(pair):
    scores = token_scores()
    apart = []
    for name in pair:
        taken = {key for one in pair for key in loss_parameters(one)} & set(SETTINGS)
        values = {key: SETTINGS[key] for key in taken}
        apart.append(LOSSES[name](scores, **{key: values[key] for key in loss_parameters(name) if key in values}))
    assert_close(objective_of(*pair)(scores), apart[0] + apart[1])
    found = objective_of(*pair, weights=[0.25, -2.0])(scores)
    assert_close(found, 0.25 * apart[0] - 2 * apart[1])
    assert_close(gradient(found, scores), gradient(0.25 * apart[0] - 2 * apart[1], scores))


def test_modifiers_and_weights_reach_every_loss_of_a_list():
    scores = replace(token_scores(), weights=GIVEN)
    found = objective_of("sigmoid", "hinge", weights=[0.5, 2.0], use_weighting=True, ld_alpha=0.3)(scores)
    sum_of_losses = 0.5 * oracle("sigmoid", scores, 0.3) + 2 * oracle("hinge", scores, 0.3)
    expected = GIVEN * oracle_weights(scores) * sum_of_losses
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


def without_smoothing(name, **options):
    values = {key: SETTINGS[key] for key in loss_parameters(name) if key in SETTINGS}
    values.pop("label_smoothing", None)
    return make_objective([name], None, {**DEFAULTS, **values}, **options)


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.3}], ids=["plain", "desensitised"])
@pytest.mark.parametrize("name", TWO_SIDED)
def test_a_label_of_probability_p_mixes_the_losses_of_both_labels(name, options):
    p = torch.tensor([0.9, 1.0, 0.5, 0.0, 0.3], dtype=torch.float64)
    scores, objective = token_scores(), without_smoothing(name, **options)
    exchanged = replace(scores, yw_idxs=scores.yl_idxs, yl_idxs=scores.yw_idxs)
    plain, other = objective(scores), objective(exchanged)
    found = objective(replace(scores, label_probs=p))
    assert_close(found, p * plain + (1 - p) * other)
    assert_close(gradient(found, scores), gradient(p * plain + (1 - p) * other, scores))
    assert_close(objective(replace(scores, label_probs=torch.ones_like(p))), plain)
    assert_close(objective(replace(scores, label_probs=torch.zeros_like(p))), other)


def test_a_label_of_probability_1_minus_e_is_label_smoothing():
    scores = token_scores()
    p = torch.full((len(PAIRS),), 1 - SETTINGS["label_smoothing"], dtype=torch.float64)
    found, expected = without_smoothing("sigmoid")(replace(scores, label_probs=p)), oracle("sigmoid", scores)
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


def test_flipping_twice_is_the_pairs_themselves():
    scores = token_scores()
    once, twice = flipped(scores), flipped(flipped(scores))
    assert torch.equal(once.yw_idxs, scores.yl_idxs)
    assert torch.equal(twice.yw_idxs, scores.yw_idxs)
    assert torch.equal(twice.yl_idxs, scores.yl_idxs)


def test_an_offset_is_taken_from_the_margin_of_its_own_pair():
    """b D - offset: an offset of b D leaves -log s(0) = log 2 for each pair."""
    scores = token_scores()
    scores = replace(scores, offsets=0.7 * scores.logratio_differences.detach())
    assert objective_of("odpo")(scores).tolist() == pytest.approx([math.log(2)] * len(PAIRS), rel=1e-12)


# ---- what an objective says of itself --------------------------------------------------------------------------------


def test_items_are_pairs_or_shares_of_groups():
    scores = replace(token_scores(), group=torch.tensor([0, 0, 0, 0, 0, 1]))
    assert objective_of("sigmoid").items(scores).tolist() == [1.0] * 5
    assert objective_of("plackett_luce").items(scores).tolist() == pytest.approx([0.2] * 5)
    one = replace(scores, group=torch.tensor([0, 0, 0, 1, 1, 1]), yw_idxs=torch.tensor([0, 2, 4, 3, 5]),
                  yl_idxs=torch.tensor([1, 1, 3, 5, 4]))  # fmt: skip
    assert objective_of("plackett_luce").items(one).tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)
    assert objective_of("plackett_luce").items(one).sum().item() == pytest.approx(2.0)


def test_an_objective_is_coupled_where_one_of_its_losses_is():
    coupled = {name for name in LOSSES if objective_of(name).coupled}
    assert coupled == set(POOLED) == set(STEP_LOSSES)
    assert objective_of("sigmoid", "sft").coupled
    assert objective_of("bco_pair", bco_running_mean=True).coupled
    assert not objective_of("bco_pair").coupled


def test_the_loss_of_a_pair_depends_on_other_pairs_only_where_it_is_coupled():
    scores = token_scores()
    dependent = set()
    for name in LOSSES:
        objective = objective_of(name)
        alone = [
            objective(replace(scores, yw_idxs=scores.yw_idxs[t : t + 1], yl_idxs=scores.yl_idxs[t : t + 1],
                              offsets=scores.offsets[t : t + 1]))
            for t in range(len(PAIRS))
        ]  # fmt: skip
        if not torch.allclose(torch.cat(alone), objective(scores), rtol=1e-10, atol=0):
            dependent.add(name)
    assert dependent == {*POOLED, "plackett_luce"}


def test_only_losses_of_likelihoods_ignore_the_reference():
    ignoring = {name for name in LOSSES if objective_of(name).ignores_reference}
    assert ignoring == set(WITHOUT_REFERENCE)
    assert objective_of("simpo", "cpo").ignores_reference
    assert not objective_of("simpo", "sigmoid").ignores_reference


def test_the_lists_of_losses_name_losses_and_each_once():
    for names in (ON_DIFFERENCES, TWO_SIDED, AGAINST_REFERENCE, WITHOUT_REFERENCE, POOLED, NOT_OF_PAIRS):
        assert set(names) <= set(LOSSES)
        assert len(set(names)) == len(names)


# ---- pairs as rows of numbers ----------------------------------------------------------------------------------------


OF_SIDES = sorted(set(LOSSES) - {"plackett_luce"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in OF_SIDES],
        *[(name, {"ld_alpha": 0.3}) for name in OF_SIDES if name != "orpo"],
        *[(name, {"use_weighting": True}) for name in WEIGHABLE],
        *[(name, {"f_divergence_type": "js_divergence"}) for name in (*ON_DIFFERENCES, "sft")],
    ],
    ids=str,
)
def test_a_table_of_sides_gives_the_same_losses_and_gradients(name, options):
    objective, scores = objective_of(name, **options), replace(token_scores(), weights=GIVEN)
    prepared = objective.prepared(scores)
    expected, found = objective.of(prepared, 0.4), objective.of(scores_of_sides(sides_table(prepared)), 0.4)
    assert_close(found, expected)
    assert_close(gradient(found, scores), gradient(expected, scores))


def test_a_table_of_sides_without_weights_and_offsets_has_ones_and_zeros():
    scores = replace(token_scores(), offsets=None)
    restored = scores_of_sides(sides_table(scores))
    assert restored.weights.tolist() == [1.0] * len(PAIRS)
    assert restored.offsets.tolist() == [0.0] * len(PAIRS)
    assert_close(restored.rewards(0.7), scores.rewards(0.7)[torch.cat((scores.yw_idxs, scores.yl_idxs))])


def test_tables_of_parts_of_a_step_are_the_table_of_the_step():
    """The gradient in the gathered table, cut into parts, is what each part's own graph goes on with."""
    objective, scores = objective_of("aot_unpaired"), token_scores()
    table = sides_table(objective.prepared(scores))
    parts = [
        sides_table(objective.prepared(replace(scores, yw_idxs=scores.yw_idxs[rows], yl_idxs=scores.yl_idxs[rows],
                                               offsets=scores.offsets[rows])))
        for rows in (slice(0, 2), slice(2, None))
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), table)
    leaf = table.detach().requires_grad_()
    upstream = torch.autograd.grad(objective.of(scores_of_sides(leaf)).sum(), leaf)[0]
    summed = sum(
        torch.autograd.grad(part, scores.pi_token_logps, slope, retain_graph=True)[0]
        for part, slope in zip(parts, upstream.split([2, 3]), strict=True)
    )
    assert_close(summed, gradient(objective(scores), scores))


# ---- the running mean ------------------------------------------------------------------------------------------------


def test_a_running_mean_is_the_mean_of_all_values_so_far():
    mean = RunningMean()
    assert mean.mean == 0.0
    mean.add(torch.tensor([1.0, 2.0]))
    assert mean.mean == pytest.approx(1.5)
    mean.add(torch.tensor([]))
    mean.add(torch.tensor([[6.0], [-1.0]], requires_grad=True))
    assert mean.mean == pytest.approx(2.0)
    assert mean.count == 4


def test_a_running_mean_does_not_lose_small_values_beside_large_ones():
    """In fp32, 1e8 + 0.25 is 1e8."""
    mean, small = RunningMean(), torch.full((100,), 0.25)
    mean.add(torch.cat((torch.tensor([1e8]), small)))
    mean.add(small)
    assert mean.mean == pytest.approx((1e8 + 50) / 201, rel=1e-14)


# ---- what is refused -------------------------------------------------------------------------------------------------


def checked_objective(loss_type=("sigmoid",), loss_weights=None, reference="auto", **options):
    """What the config makes of its options, without the config."""
    values = {name: options.pop(name, default) for name, default in DEFAULTS.items()}
    objective = make_objective(loss_type, loss_weights, values, **options)
    check_reference(objective, reference)
    return objective


FORWARD = {"f_divergence_type": "forward_kl"}
REFUSED = [
    ({"loss_type": ["dpo"]}, r"`loss_type` must be one of \['aot', .*, or a list of them, got 'dpo'"),
    ({"loss_type": []}, r"`loss_type` must name each loss once, got \[\]"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "must name each loss once, .* Use `loss_weights`"),
    ({"loss_weights": []}, r"`loss_weights` must be one number for each of \['sigmoid'\], got \[\]"),
    ({"loss_weights": [1.0, 2.0]}, r"`loss_weights` must be one number for each of .*, got \[1.0, 2.0\]"),
    ({"loss_weights": [math.nan]}, r"`loss_weights` must be one number .*, got \[nan\]"),
    ({"loss_weights": [math.inf]}, r"`loss_weights` must be one number .*, got \[inf\]"),
    ({"beta": 0.0}, "`beta` must be above 0 and finite, got 0.0"),
    ({"loss_type": ["exo_pair"]}, "`label_smoothing` must be above 0 for loss_type='exo_pair', got 0"),
    ({"loss_type": ["sigmoid", "exo_pair"]}, "`label_smoothing` must be above 0 for loss_type='exo_pair', got 0"),
    ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "`label_smoothing` must be 0 for .*'hinge'.*does not use it"),
    ({"discopop_tau": 0.1}, r"`discopop_tau` must be 0.05 for .*, got 0.1. Losses that do: \['discopop'\]"),
    ({"simpo_gamma": 1.0}, r"`simpo_gamma` must be 0.5 for .*, got 1.0. Losses that do: \['simpo'\]"),
    ({"orpo_lambda": 1.0}, r"`orpo_lambda` must be 0.1 for .*, got 1.0. Losses that do: \['orpo'\]"),
    ({"cpo_alpha": 0.5}, r"`cpo_alpha` must be 1 for .*, got 0.5. Losses that do: \['cpo'\]"),
    ({"dpop_lambda": 5.0}, r"`dpop_lambda` must be 50 for .*, got 5.0. Losses that do: \['dpop'\]"),
    ({"f_divergence_type": "kl"}, r"`f_divergence_type` must be one of \['reverse_kl', .*, got 'kl'. Use"),
    ({"f_alpha_divergence_coef": 0.3}, "`f_alpha_divergence_coef` must be 0.5 for f_divergence_type='reverse_kl'"),
    ({**FORWARD, "f_alpha_divergence_coef": 0.3}, "must be 0.5 for f_divergence_type='forward_kl', which does not use"),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.inf},
        "`f_alpha_divergence_coef` must be finite, got inf. 1 is",
    ),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.nan},
        "`f_alpha_divergence_coef` must be finite, got nan",
    ),
    *[({"ld_alpha": value}, r"`ld_alpha` must be in \[0, 1\], or None, got") for value in (-0.1, 1.1, math.nan)],
    ({"ld_alpha": 0.5, "loss_type": ["plackett_luce"]}, "`ld_alpha` must not be used with loss_type='plackett_luce'"),
    ({"ld_alpha": 0.5, "loss_type": ["orpo"]}, "`ld_alpha` must not be used with loss_type='orpo', .* Drop one"),
    ({"bco_running_mean": True}, "`bco_running_mean` must be False without loss_type='bco_pair', got True"),
    ({"loss_type": ["plackett_luce", "sft"]}, r"'plackett_luce' must be alone, got \['plackett_luce', 'sft'\]"),
    ({"loss_type": ["sigmoid", "plackett_luce"]}, "loss_type='plackett_luce' must be alone"),
    (
        {**FORWARD, "reference": "none"},
        "`f_divergence_type` must be 'reverse_kl' with reference='none', got 'forward_kl'",
    ),
    *[
        ({"use_weighting": True, "loss_type": [name]}, f"`use_weighting` must not be used with loss_type='{name}'")
        for name in ("aot", "aot_unpaired", "sft", "plackett_luce")
    ],
    ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "`use_weighting` must not .* loss_type='sft'"),
    *[
        ({**FORWARD, "loss_type": [name]}, f"f_divergence_type='forward_kl' must not be used with loss_type='{name}'")
        for name in (
            *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
            *("simpo", "orpo", "cpo", "dpop", "plackett_luce"),
        )
    ],
    *[
        ({"reference": "none", "loss_type": [name]}, f"reference='none' must not be used with loss_type='{name}'")
        for name in ("nca_pair", "bco_pair", "sppo_hard", "aot_unpaired", "apo_zero", "apo_down", "dpop")
    ],
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_has_no_meaning_is_refused_by_the_objective_and_by_the_config(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        checked_objective(**options)
    with pytest.raises(ValueError, match=message):
        make_args(**options)


def test_a_delta_given_as_an_option_is_refused_or_used():
    """It is a running mean that the step hands over, so a fixed one cannot be silently dropped."""
    scores = token_scores()
    try:
        objective = make_objective(["bco_pair"], None, {"beta": 0.1, "bco_delta": 1.0})
    except ValueError as error:
        assert str(error).startswith("`bco_delta` must be left out, got 1.0: ")
        assert "Set `bco_running_mean`" in str(error)
        return
    expected = LOSSES["bco_pair"](scores, beta=0.1, bco_delta=1.0)
    assert_close(objective(scores), expected)


def test_what_has_a_meaning_is_accepted_by_the_objective_and_by_the_config(make_args):
    for name in LOSSES:
        objective = objective_of(name)
        options = {key: SETTINGS[key] for key in loss_parameters(name) if key in SETTINGS}
        assert make_args(loss_type=[name], **options).objective == objective
    args = make_args(
        loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], ld_alpha=0.3, use_weighting=True,
        bco_running_mean=True,
    )  # fmt: skip
    assert args.objective == Objective(
        ("sigmoid", "bco_pair"), (0.8, 0.2), DEFAULTS, ld_alpha=0.3, use_weighting=True, bco_running_mean=True
    )
    assert make_args(loss_type="simpo", reference="none").objective.losses == ("simpo",)


@pytest.mark.parametrize("reference", ["auto", "base", "initial", "none"])
def test_without_a_reference_exactly_the_losses_of_single_log_ratios_are_refused(reference):
    refused = set()
    for name in LOSSES:
        try:
            check_reference(objective_of(name), reference)
        except ValueError:
            refused.add(name)
    assert refused == (set(AGAINST_REFERENCE) if reference == "none" else set())


def refusals(columns, label_smoothing=0.0):
    refused = set()
    for name in LOSSES:
        try:
            check_columns(
                without_smoothing(name) if name != "exo_pair" else objective_of(name), columns, label_smoothing
            )
        except ValueError as error:
            refused.add((name, str(error).split("`")[1] if "`" in str(error) else ""))
    return refused


def test_columns_of_values_are_refused_where_a_loss_has_no_use_for_them():
    assert refusals([]) == {("odpo", "offsets")}
    assert refusals(["weights"]) == {("aot", "weights"), ("aot_unpaired", "weights"), ("odpo", "offsets")}
    assert refusals(["offsets"]) == {(name, "offsets") for name in set(LOSSES) - {"odpo"}}
    assert refusals(["label_probs"]) == {(name, "label_probs") for name in set(LOSSES) - set(TWO_SIDED)}


@pytest.mark.parametrize(
    ("names", "columns", "label_smoothing", "message"),
    [
        (["aot"], ["weights"], 0.0, "The column `weights` must not be used with loss_type='aot', .* quantiles"),
        (["sigmoid", "aot"], ["weights"], 0.0, "The column `weights` must not be used with loss_type='aot'"),
        (["robust"], ["label_probs"], 0.0, "The column `label_probs` must not be used with loss_type='robust'"),
        (["sigmoid", "sft"], ["label_probs"], 0.0, "The column `label_probs` must not be used with loss_type='sft'"),
        (["sigmoid"], ["label_probs"], 0.15, "`label_smoothing` must be 0 with a column `label_probs`, .* got 0.15"),
        (["odpo"], [], 0.0, "must have an offset for each pair, got none. Add an `offsets` column"),
        (["sigmoid", "odpo"], ["weights"], 0.0, "Add an `offsets` column"),
        (
            ["sigmoid"],
            ["offsets"],
            0.0,
            r"`offsets` must go with .*'odpo', .* got \['sigmoid'\]. Remove the column, or",
        ),
        (["simpo"], ["ref_logps"], 0.0, r"`ref_logps` must go with a loss .*, got \['simpo'\]. Remove the column"),
    ],
)
def test_a_refused_column_is_named_with_the_loss_and_the_way_out(names, columns, label_smoothing, message):
    with pytest.raises(ValueError, match=message):
        check_columns(objective_of(*names), columns, label_smoothing)


def test_given_log_probabilities_have_no_token_to_count_less():
    with pytest.raises(ValueError, match=r"`ld_alpha` must be None with a column `ref_logps`, got 0.5: .* Drop one"):
        check_columns(objective_of("sigmoid", ld_alpha=0.5), ["ref_logps"])


def test_every_value_column_that_a_loss_can_use_is_accepted():
    check_columns(without_smoothing("sigmoid"), ["weights", "label_probs"])
    check_columns(objective_of("sigmoid"), ["weights"], SETTINGS["label_smoothing"])
    check_columns(objective_of("odpo"), ["weights", "offsets"])
    check_columns(objective_of("plackett_luce"), ["weights"])


def test_the_config_hands_every_hyperparameter_over(make_args):
    assert make_args().objective.hyperparameters == DEFAULTS
    assert set(DEFAULTS) <= set(QLoRADPOConfig.__dataclass_fields__)
