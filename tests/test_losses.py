"""Loss values against numbers derived by hand, gradients against an independent implementation."""

import math

import pytest
import torch

from qlora_dpo.losses import LOSSES, Scores, dpo_loss, loss_parameters

from reference_impl import pair_loss


def scores_of(pi, ref, pairs, lengths=None):
    w, l = zip(*pairs, strict=True)
    return Scores(
        pi_logps=pi,
        ref_logps=ref,
        yw_idxs=torch.tensor(w),
        yl_idxs=torch.tensor(l),
        lengths=torch.tensor(lengths or [1] * len(pi)),
        group=torch.zeros(len(pi), dtype=torch.long),
    )


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
    pi, ref = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    scores = scores_of(pi, ref, [(0, 1), (0, 3), (2, 1)])
    losses, _ = dpo_loss(pi, ref, scores.yw_idxs, scores.yl_idxs, 0.3)
    assert torch.equal(LOSSES["sigmoid"](scores, beta=0.3), losses) or torch.allclose(
        LOSSES["sigmoid"](scores, beta=0.3), losses, rtol=1e-14, atol=0
    )


def test_label_smoothing_mixes_both_directions():
    """D = 10, beta = 0.1: 0.9 * log(1 + e^-1) + 0.1 * log(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262."""
    scores = scores_of(torch.tensor([5.0, -5.0]), torch.zeros(2), [(0, 1)])
    assert LOSSES["sigmoid"](scores, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.4132617, abs=1e-6)


def test_hinge_by_hand():
    """D = 4 and -4 at beta 0.1: 1 - 0.4 = 0.6 and 1.4; D = 40: 0."""
    scores = scores_of(torch.tensor([2.0, -2.0, 38.0]), torch.zeros(3), [(0, 1), (1, 0), (2, 1)])
    assert LOSSES["hinge"](scores, beta=0.1).tolist() == pytest.approx([0.6, 1.4, 0.0])


def test_ipo_by_hand():
    """h = 4 over 2 tokens, -3 over 3: (2 + 1 - 1 / (2 * 0.5))^2 = 4."""
    scores = scores_of(torch.tensor([4.0, -3.0]), torch.zeros(2), [(0, 1)], lengths=[2, 3])
    assert LOSSES["ipo"](scores, beta=0.5).item() == pytest.approx(4.0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_value_and_gradient_equal_an_independent_implementation(name):
    torch.manual_seed(0)
    pi = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64)
    lengths, pairs = [3, 7, 1, 4, 2], [(0, 1), (2, 1), (4, 3)]
    LOSSES[name](scores_of(pi, ref, pairs, lengths), beta=0.7).sum().backward()
    found, pi.grad = pi.grad, None
    expected = [pair_loss(name, pi[w], pi[l], ref[w], ref[l], lengths[w], lengths[l], 0.7, 0.0) for w, l in pairs]
    values = LOSSES[name](scores_of(pi, ref, pairs, lengths), beta=0.7)
    assert values.tolist() == pytest.approx([e.item() for e in expected], rel=1e-12)
    torch.stack(expected).sum().backward()
    assert torch.allclose(found, pi.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("difference", [0.0, 50.0, -50.0, 2000.0, -2000.0])
def test_extreme_differences_stay_finite(name, difference):
    pi = torch.tensor([difference, 0.0], requires_grad=True)
    loss = LOSSES[name](scores_of(pi, torch.zeros(2), [(0, 1)]), beta=0.1).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(pi.grad).all()


def test_a_constant_on_all_log_probs_changes_nothing():
    pi, ref = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    pairs = [(0, 1), (1, 2)]
    for name in ("sigmoid", "hinge"):
        before = LOSSES[name](scores_of(pi, ref, pairs), beta=0.2)
        after = LOSSES[name](scores_of(pi + 3, ref, pairs), beta=0.2)
        assert torch.allclose(before, after, rtol=1e-12)


def test_loss_parameters_are_fields_of_the_config():
    from qlora_dpo import QLoRADPOConfig

    for name in LOSSES:
        assert set(loss_parameters(name)) <= set(QLoRADPOConfig.__dataclass_fields__)
