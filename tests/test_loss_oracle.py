"""The loss oracle against numbers derived by hand, all of them logarithms and fractions of small integers."""

from math import log, sqrt

import pytest
import torch

from loss_oracle import PAIR_LOSSES, divergence_score, ld_logps, pair_loss, plackett_luce, step_losses, wpo_weight


def f64(value, requires_grad=False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=requires_grad)


def make_side(pi_w, pi_l, ref_w, ref_l, len_w=1, len_l=1, **more):
    """One pair, from the probabilities of whole completions."""
    nats = {"pi_w": f64(log(pi_w)), "pi_l": f64(log(pi_l)), "ref_w": f64(log(ref_w)), "ref_l": f64(log(ref_l))}
    return {**nats, "len_w": len_w, "len_l": len_l, **more}


def swapped(side):
    return {
        **{"pi_w": side["pi_l"], "pi_l": side["pi_w"], "ref_w": side["ref_l"], "ref_l": side["ref_w"]},
        **{"len_w": side["len_l"], "len_l": side["len_w"]},
    }


SIDE = make_side((2 / 3) ** 2, (1 / 9) ** 3, (1 / 3) ** 2, (4 / 9) ** 3, len_w=2, len_l=3, offset=f64(log(2)))
TIED = make_side(1 / 5, 1 / 7, 1 / 5, 1 / 7, offset=f64(0.0))
HYPER = {
    "exo_pair": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.05},
    "simpo": {"simpo_gamma": 0.5},
    "orpo": {"orpo_lambda": 0.1},
    "cpo": {"cpo_alpha": 1.0},
    "dpop": {"dpop_lambda": 50.0},
}


@pytest.mark.parametrize(
    ("name", "hyper", "expected"),
    [
        ("sigmoid", {}, log(17 / 16)),
        ("sigmoid", {"label_smoothing": 0.25}, 0.75 * log(17 / 16) + 0.25 * log(17)),
        ("hinge", {}, 0.0),
        ("ipo", {}, (3 * log(2) - 1) ** 2),
        ("exo_pair", {"label_smoothing": 0.2}, 16 / 17 * log(20 / 17) + 1 / 17 * log(5 / 17)),
        ("nca_pair", {}, log(3 / 2) + log(3) / 2 + log(9 / 8) / 2),
        ("robust", {"label_smoothing": 0.25}, 1.5 * log(17 / 16) - 0.5 * log(17)),
        ("bco_pair", {}, log(3 / 2) + log(9 / 8)),
        ("bco_pair", {"bco_delta": log(2)}, log(2) + log(17 / 16)),
        ("sppo_hard", {}, (2 * log(2) - 1) ** 2 + (1 - 6 * log(2)) ** 2),
        ("apo_zero", {}, 4 / 9),
        ("apo_down", {}, 37 / 51),
        ("discopop", {"discopop_tau": 0.5}, log(17 / 16) / 257 + 16 / 257),
        ("sigmoid_norm", {}, log(1 + 1 / sqrt(8))),
        ("simpo", {"simpo_gamma": log(2)}, log(1 + sqrt(2 / 3))),
        ("orpo", {"orpo_lambda": 0.5}, log(3 / 2) + 0.5 * log(17 / 16)),
        ("cpo", {"cpo_alpha": 0.5}, log(19 / 18) + 0.5 * log(3 / 2)),
        ("dpop", {"dpop_lambda": 2.0}, log(17 / 16)),
        ("odpo", {}, log(9 / 8)),
    ],
)
def test_pair_losses_equal_the_numbers_derived_by_hand(name, hyper, expected):
    """Per token the policy gives 2/3 and the reference 1/3 (chosen, 2 tokens), 1/9 and 4/9 (rejected, 3 tokens).

    h_w = 2 log 2, h_l = 3 log(1/4) = -6 log 2, D = 8 log 2. With beta = 1/2:
    beta h_w = log 2, so s(beta h_w) = 2/3 and s(-beta h_w) = 1/3;
    beta h_l = -log 8, so s(beta h_l) = 1/9 and s(-beta h_l) = 8/9;
    beta D = log 16, so s(beta D) = 16/17 and s(-beta D) = 1/17; 1 / (2 beta) = 1.

    hinge: 1 - log 16 < 0. ipo, sigmoid_norm: log 2 - log(1/4) = 3 log 2 per token; exp(-3/2 log 2) = 1 / sqrt(8).
    exo_pair: (16/17) / 0.8 = 20/17, (1/17) / 0.2 = 5/17. robust: divided by 1 - 2 * 0.25 = 1/2.
    bco_pair, delta = log 2: s(log 2 - log 2) = 1/2, s(log 8 + log 2) = 16/17.
    apo_zero: 1/3 + 1/9. apo_down: 2/3 + 1/17 = (34 + 3) / 51.
    discopop, tau = 1/2: s(2 log 16) = 256/257; log(17/16) / 257 + 256/257 * 1/16.
    simpo: log(2/3) - log(1/9) = log 6; exp(-(log 6)/2 + log 2) = 2 / sqrt(6) = sqrt(2/3).
    orpo: odds (2/3) / (1/3) = 2 and (1/9) / (8/9) = 1/8, ratio 16; NLL per chosen token log(3/2).
    cpo: 1/2 log(4/9 * 729) = log 18. dpop: h_w > 0, no penalty. odpo: log 16 - log 2 = log 8.
    """
    assert pair_loss(name, SIDE, beta=0.5, **hyper).item() == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "hyper", "expected"),
    [
        ("sigmoid", {}, log(17)),
        ("hinge", {}, 1 + log(16)),
        ("dpop", {"dpop_lambda": 2.0}, log(1025)),
        ("discopop", {"discopop_tau": 0.5}, 256 / 257 * log(17) + 16 / 257),
    ],
)
def test_a_pair_the_wrong_way_round_costs_what_it_should(name, hyper, expected):
    """The pair above, swapped: h_w = -6 log 2, D = -8 log 2, beta D = -log 16, exp(-beta D) = 16.

    dpop: 1/2 (-8 - 2 * 6) log 2 = -10 log 2, and 1 + 2^10 = 1025. discopop: s(-2 log 16) = 1/257.
    """
    assert pair_loss(name, swapped(SIDE), beta=0.5, **hyper).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("name", "label_smoothing", "expected"),
    [
        ("aot", 0.0, [log(3), log(7 / 4)]),
        ("aot", 0.25, [0.75 * log(3) + 0.25 * log(3 / 2), 0.75 * log(7 / 4) + 0.25 * log(7 / 3)]),
        ("aot_unpaired", 0.0, [log(7 / 2), log(8 / 5)]),
        ("aot_unpaired", 0.25, [0.75 * log(7 / 2) + 0.25 * log(7 / 5), 0.75 * log(8 / 5) + 0.25 * log(8 / 3)]),
    ],
)
def test_sorted_losses_couple_the_kth_smallest_of_each_list(name, label_smoothing, expected):
    """Two pairs a, b whose orders disagree, beta = 1/2.

    log pi_w - log pi_l: a log 16, b 0. log ref_w - log ref_l: a log 4, b log 9.
    aot: 0 - log 4, halved -log 2, s = 1/3; log 16 - log 9, halved log(4/3), s = 4/7.
    h_w: a log 4, b log(4/25). h_l: a 0, b log(36/25).
    aot_unpaired: log(4/25) - 0, halved log(2/5), s = 2/7; log 4 - log(36/25), halved log(5/3), s = 5/8.
    """
    sides = [make_side(1 / 4, 1 / 64, 1 / 16, 1 / 64), make_side(1 / 25, 1 / 25, 1 / 4, 1 / 36)]
    actual = step_losses(name, sides, beta=0.5, label_smoothing=label_smoothing)
    torch.testing.assert_close(actual, f64(expected), rtol=1e-13, atol=0)


def test_sft_pools_the_tokens_of_the_step():
    """-(log 1/4 + log 1/25) / (2 + 3) = log(100) / 5; the mean of the per-completion means is log(2)/2 + log(25)/6."""
    sides = [make_side(1 / 4, 1 / 2, 1, 1, len_w=2), make_side(1 / 25, 1 / 2, 1, 1, len_w=3)]
    torch.testing.assert_close(step_losses("sft", sides, beta=0.5), f64([log(100) / 5] * 2), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([(0, 1), (0, 2), (1, 2)], log(7 / 4) + log(3 / 2)),
        ([(0, 2), (1, 2)], log(5 / 4) + log(3 / 2)),
        ([(2, 0), (2, 1)], log(7)),
        ([], 0.0),
    ],
)
def test_plackett_luce_sums_over_the_winners(beats, expected):
    """beta h = (log 4, log 2, 0): shares 4/(4+2+1) and 2/(2+1); with 0 and 1 tied 4/(4+1) and 2/(2+1); 1/(1+4+2)."""
    h = 2 * torch.log(f64([4.0, 2.0, 1.0]))
    assert plackett_luce(h, beats, 0.5).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "coef", "expected"),
    [
        ("reverse_kl", 0.5, log(4)),
        ("forward_kl", 0.5, 3 / 4),
        ("js_divergence", 0.5, log(8 / 5)),
        ("alpha_divergence", 0.5, 1.0),
        ("alpha_divergence", 3.0, 15 / 2),
        ("alpha_divergence", 0.0, 3 / 4),
        ("alpha_divergence", 1.0, log(4)),
    ],
)
def test_divergence_scores_at_ratio_four(kind, coef, expected):
    """t = 4: 1 - 1/4; log(2 * 4 / 5); (1/2 - 1) / (-1/2); (4^2 - 1) / 2; (1/4 - 1) / (-1); log 4 in the limit."""
    assert divergence_score(kind, f64(log(4)), coef).item() == pytest.approx(expected, rel=1e-13)


def test_divergences_agree_to_second_order_at_the_reference():
    """Every f' has f'(1) = 0 and slope 1 in h there, but Jensen-Shannon: d/dh log(2t/(t+1)) = 1/(t+1) = 1/2."""
    for kind, slope in (("reverse_kl", 1), ("forward_kl", 1), ("js_divergence", 1 / 2), ("alpha_divergence", 1)):
        h = f64(0.0, requires_grad=True)
        score = divergence_score(kind, h, 0.3)
        score.backward()
        assert (score.item(), h.grad.item()) == pytest.approx((0, slope), abs=1e-15)


def test_ld_logps_scales_the_tail_of_the_longer_completion_only():
    """-1 - 2 = -3; -1 - 3 + 0.25 (-5 - 7) = -7."""
    short, long = f64([-1.0, -2.0]), f64([-1.0, -3.0, -5.0, -7.0])
    assert [x.item() for x in ld_logps(short, long, 0.25)] == [-3, -7]
    assert [x.item() for x in ld_logps(long, short, 0.25)] == [-7, -3]


def test_wpo_weight_is_a_product_of_geometric_means_without_gradient():
    """Chosen: (1/2)/(1/2) = 1 and (1/2)/(1/8) = 4, geometric mean 2; rejected: (1/8)/(1/2) = 1/4; product 1/2."""
    logps_w = torch.log(f64([1 / 2, 1 / 2], requires_grad=True))
    sum_sq_w, logps_l, sum_sq_l = torch.log(f64([1 / 2, 1 / 8])), torch.log(f64([1 / 8])), torch.log(f64([1 / 2]))
    weight = wpo_weight(logps_w, sum_sq_w, logps_l, sum_sq_l)
    assert weight.item() == pytest.approx(1 / 2, rel=1e-13)
    assert not weight.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# Limits and orders


def test_losses_that_meet_are_equal():
    """K = 2, T = 1, no smoothing, no offset, no penalty, no shift and length 1 each give DPO back."""
    side = make_side(1 / 3, 1 / 5, 1 / 4, 1 / 11, offset=0.0)
    dpo = pair_loss("sigmoid", side, beta=0.3)
    h = torch.stack([side["pi_w"] - side["ref_w"], side["pi_l"] - side["ref_l"]])
    for other in (
        plackett_luce(h, [(0, 1)], 0.3),
        step_losses("aot", [side], beta=0.3)[0],
        step_losses("aot_unpaired", [side], beta=0.3)[0],
        pair_loss("robust", side, beta=0.3),
        pair_loss("odpo", side, beta=0.3),
        pair_loss("dpop", side, beta=0.3, dpop_lambda=5.0),
        pair_loss("sigmoid_norm", side, beta=0.3),
    ):
        torch.testing.assert_close(other, dpo, rtol=1e-13, atol=0)


def test_robust_is_unbiased_under_flipped_labels():
    """(1 - e) robust(pair) + e robust(swapped pair) = DPO(pair)."""
    clean, flipped = (pair_loss("robust", side, beta=0.5, label_smoothing=0.1) for side in (SIDE, swapped(SIDE)))
    torch.testing.assert_close(0.9 * clean + 0.1 * flipped, pair_loss("sigmoid", SIDE, beta=0.5), rtol=1e-12, atol=0)


def test_discopop_of_small_tau_is_exponential_above_zero_and_logistic_below():
    """D > 0: exp(-log 16) = 1/16; D < 0: log 17; D = 0: the mean of log 2 and 1."""
    right, wrong, tied = (pair_loss("discopop", x, beta=0.5, discopop_tau=1e-3) for x in (SIDE, swapped(SIDE), TIED))
    assert right.item() == pytest.approx(1 / 16, rel=1e-13)
    assert wrong.item() == pytest.approx(log(17), rel=1e-13)
    assert tied.item() == pytest.approx((log(2) + 1) / 2, rel=1e-13)


def test_exo_of_a_tied_pair_is_the_divergence_from_a_coin():
    """q = (1/2, 1/2): 1/2 log(0.5/0.9) + 1/2 log(0.5/0.1) = 1/2 log(25/9) = log(5/3); nothing at e = 1/2."""
    assert pair_loss("exo_pair", TIED, beta=0.5, label_smoothing=0.1).item() == pytest.approx(log(5 / 3), rel=1e-13)
    assert pair_loss("exo_pair", TIED, beta=0.5, label_smoothing=0.5).item() == pytest.approx(0, abs=1e-15)


def test_exo_is_zero_where_the_policy_has_the_smoothed_preference():
    """s(beta D) = 16/17 = 1 - e at e = 1/17."""
    assert pair_loss("exo_pair", SIDE, beta=0.5, label_smoothing=1 / 17).item() == pytest.approx(0, abs=1e-15)


def test_exo_without_smoothing_is_refused():
    with pytest.raises(ValueError, match="`label_smoothing` must be positive for exo_pair, got 0"):
        pair_loss("exo_pair", SIDE, beta=0.5, label_smoothing=0.0)


def test_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="`kind` must be a divergence of this function, got 'kl'"):
        divergence_score("kl", f64(0.0))


def test_a_hyperparameter_of_another_loss_is_refused():
    with pytest.raises(TypeError, match="label_smoothing"):
        pair_loss("cpo", SIDE, beta=0.5, cpo_alpha=1.0, label_smoothing=0.1)


@pytest.mark.parametrize("size", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_values_and_gradients_are_finite_up_to_sixty_nats(name, size):
    """One side at h = 60 and the other at -60, and both at their reference."""
    pi_w, pi_l = f64(-61 + size, requires_grad=True), f64(-61 - size, requires_grad=True)
    side = {"pi_w": pi_w, "pi_l": pi_l, "ref_w": f64(-61.0), "ref_l": f64(-61.0), "len_w": 2, "len_l": 3}
    loss = pair_loss(name, {**side, "offset": 0.5}, beta=0.5, **HYPER.get(name, {}))
    loss.backward()
    assert all(torch.isfinite(x) for x in (loss, pi_w.grad, pi_l.grad))


def test_gradient_of_dpo_is_the_doubt_in_the_pair():
    """d/d pi_w of -log s(beta D) = -beta s(-beta D) = -1/2 * 1/17, and the opposite for pi_l."""
    side = {**SIDE, "pi_w": SIDE["pi_w"].clone().requires_grad_(), "pi_l": SIDE["pi_l"].clone().requires_grad_()}
    pair_loss("sigmoid", side, beta=0.5).backward()
    assert [side["pi_w"].grad.item(), side["pi_l"].grad.item()] == pytest.approx([-1 / 34, 1 / 34], rel=1e-13)
