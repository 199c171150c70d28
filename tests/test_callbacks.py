"""Warnings about what a log shows, each once and none without its reason."""

import re
import warnings

import pytest
from datasets import Dataset

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.callbacks import troubles

from test_trainer import policy_of
from tiny_chat import CHAT_ROWS


def line(step, **values):
    healthy = {
        "step": step, "grad_norm": 1.0, "rewards/margins": 0.1 * step, "rewards/chosen": 0.05 * step,
        "rewards/accuracies": 0.8, "rewards/ties": 0.0, "logps/chosen": -50.0 + step,
    }  # fmt: skip
    return healthy | values


def test_a_healthy_log_is_left_alone():
    assert troubles([line(step) for step in range(1, 9)]) == {}
    assert troubles([]) == {}


def falling(count=9, noise=0.0, **values):
    """A log whose chosen rewards fall by 0.1 a line while margins grow, other pairs in each."""
    return [
        line(step, **{"rewards/chosen": -0.1 * step + noise * (-1) ** step, "logps/chosen": -50.0 + 25 * (-1) ** step})
        | values
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_chosen_that_fall_while_margins_grow_are_named_with_the_remedies(noise):
    """Log-probabilities of the chosen, which differ from pair to pair by more than they fall, do not hide it."""
    log = falling(noise=noise)
    assert "'apo_zero' or 'dpop'" in troubles(log)["chosen_falls"]
    assert "chosen_falls" not in troubles(log[:8])
    assert "chosen_falls" not in troubles(falling(noise=1.0))
    assert "chosen_falls" not in troubles(falling(**{"rewards/margins": 0.0}))
    assert "chosen_falls" not in troubles(log, referenced=False)


@pytest.mark.parametrize(
    "options", [{"reference": "none", "loss_type": "simpo", "beta": 2.0}, {}], ids=["none", "base"]
)
def test_a_policy_that_is_not_trained_does_not_fall(options, tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS * 4)
    args = make_args(max_steps=24, learning_rate=0.0, per_device_train_batch_size=1, **options)
    trainer = QLoRADPOTrainer(policy_of(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if str(w.message).startswith("chosen_falls")]


def test_a_gradient_that_is_not_finite_is_named_at_once():
    assert "at step 1" in troubles([line(1, grad_norm=float("nan"))])["grad_norm_not_finite"]


def test_a_scale_of_the_loss_that_finds_its_size_is_left_alone():
    """In fp16 the first steps may overflow and are left out; where that does not end it is named."""
    log = [line(step, grad_norm=float("inf")) for step in (1, 2, 3)]
    assert "grad_norm_not_finite" not in troubles(log[:2], loss_scaled=True)
    assert "grad_norm_not_finite" not in troubles([*log[:2], line(3)], loss_scaled=True)
    assert "at step 3" in troubles(log, loss_scaled=True)["grad_norm_not_finite"]


def test_ties_that_stay_are_named():
    log = [line(step, **{"rewards/ties": 0.9}) for step in range(1, 5)]
    assert "ties" in troubles(log)
    assert "ties" not in troubles(log[:3])


@pytest.mark.parametrize("name", ["", "chats", "a_b"])
def test_accuracies_that_part_are_named_with_the_set(name):
    """Whether evaluation was better before, or never learned what training did."""
    log = [line(step, **{"rewards/accuracies": 0.95}) for step in range(1, 4)]
    evaluated = [{f"eval_{name}_rewards/accuracies".replace("__", "_"): value} for value in (0.7, 0.6, 0.6, 0.8)]
    said = troubles([*log, *evaluated[:2]])["overfitting"]
    assert f"0.95 in training and 0.60 in evaluation{name and f' on {name}'}, at best 0.70" in said
    assert "overfitting" in troubles([*log, *evaluated[1:3]])
    assert "overfitting" not in troubles([*log, *evaluated[:1]])
    assert "overfitting" not in troubles([*log, *evaluated])


def test_a_run_is_warned_once_of_each(tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args(max_steps=6, learning_rate=0.0)
    trainer = QLoRADPOTrainer(policy_of(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.warns(UserWarning, match="More than half") as caught:
        trainer.train()
    assert len([w for w in caught if str(w.message).startswith("ties:")]) == 1


def test_a_run_that_learns_is_not_warned(tokenizer, make_args):
    rows = Dataset.from_list(CHAT_ROWS)
    args = make_args(max_steps=6, learning_rate=1e-2, loss_type=["sigmoid", "sft"])
    trainer = QLoRADPOTrainer(policy_of(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if re.match("(ties|chosen_falls|overfitting|grad_norm)", str(w.message))]
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[-1] > margins[0] == 0
