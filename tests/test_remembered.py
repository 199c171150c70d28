"""Evaluations of a training score the reference once, and say the same to the last bit."""

import pytest
import torch
from datasets import Dataset

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.layouts import GroupCollator, group_of, make_batch
from qlora_dpo.reference import BaseReference
from qlora_dpo.remembered import Remembered

from one_step import RANKED
from test_trainer import policy_of
from tiny_chat import CHAT_ROWS


def scored(value=1.0, size=4):
    return {"logps": torch.full((size,), value)}


def batch_of(trainer, rows, layout="tree", max_tokens=None):
    return make_batch([group_of(trainer.train_dataset[i]) for i in rows], layout, max_tokens=max_tokens)


def trainer_of(tokenizer, args, train=CHAT_ROWS, evaluated=CHAT_ROWS[:5]):
    data = {"train_dataset": Dataset.from_list(train), "eval_dataset": Dataset.from_list(evaluated)}
    return QLoRADPOTrainer(policy_of(tokenizer), args=args, processing_class=tokenizer, **data)


def test_a_batch_is_computed_once_and_another_forward_of_it_is_another(tokenizer, make_args):
    trainer, remembered, computed = trainer_of(tokenizer, make_args(max_length=None), RANKED), Remembered(2**20), []

    def of(batch, asked=True):
        return remembered.of(batch, asked, lambda: computed.append(1) or scored(len(computed)))["logps"][0].item()

    both = batch_of(trainer, [0, 1])
    assert [of(both), of(both), of(batch_of(trainer, [0, 1]))] == [1, 1, 1]
    others = [batch_of(trainer, [1, 0]), batch_of(trainer, [0]), batch_of(trainer, [0, 1], "packed")]
    others += [batch_of(trainer, [0, 1], "padded"), batch_of(trainer, [0, 1], max_tokens=20)]
    assert [of(other) for other in others] == [2, 3, 4, 5, 6]
    assert of(both, asked=False) == 7
    assert [of(other) for other in others] == [2, 3, 4, 5, 6]


def test_no_more_is_kept_than_there_is_room_for(tokenizer, make_args):
    """Room for two results of 16 bytes and a smaller one."""
    trainer, remembered, computed = trainer_of(tokenizer, make_args()), Remembered(40), []
    for _ in range(2):
        for i, size in enumerate((4, 4, 4, 2)):
            remembered.of(batch_of(trainer, [i]), True, lambda i=i, size=size: computed.append(i) or scored(size=size))
    assert computed == [0, 1, 2, 3, 2]


def run(tokenizer, args, monkeypatch, room):
    """Log lines of a training with an evaluation after each step, and what the reference scored without gradient."""
    monkeypatch.setattr("qlora_dpo.trainer.spare_host_memory", lambda: room)
    calls, real = [], BaseReference.__call__
    monkeypatch.setattr(BaseReference, "__call__", lambda *given: calls.append(given[2]["keys"]) or real(*given))
    torch.manual_seed(0)
    trainer = trainer_of(tokenizer, args)
    trainer.train()
    monkeypatch.setattr(BaseReference, "__call__", real)
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    numbers = [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines]
    return trainer, numbers, len(calls)


@pytest.mark.parametrize("options", [{}, {"eval_kl": False}, {"ld_alpha": 0.5, "eval_kl": False}], ids=str)
def test_evaluations_are_the_same_to_the_last_bit_and_score_the_reference_once(
    tokenizer, make_args, monkeypatch, options
):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2, **options}
    options |= {"per_device_eval_batch_size": 2}
    _, without, all_calls = run(tokenizer, make_args(**options), monkeypatch, 0)
    trainer, found, calls = run(tokenizer, make_args(**options), monkeypatch, 2**30)
    assert found == without
    assert len(found) == 3
    assert found[0]["eval_rewards/margins"] != found[2]["eval_rewards/margins"]
    assert all_calls - calls == 2 * 3  # three batches, in two of three evaluations
    assert trainer._remembered is None  # what was kept is gone with the training


def test_a_reference_that_moves_is_not_remembered(tokenizer, make_args):
    options = {"max_steps": 2, "sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 1e-2}
    trainer = trainer_of(tokenizer, make_args(**options))
    assert trainer._memory() is None
    trainer.train()
    seen = trainer.evaluate()["eval_rewards/margins"]
    trainer.reference.update()
    assert trainer.evaluate()["eval_rewards/margins"] != seen


def test_given_log_probabilities_are_not_mistaken_for_remembered_ones(tokenizer, make_args):
    """Two sets of the same rows with other values of `ref_logps`, while a training remembers."""
    rows = [[dict(row, ref_logps=[first, -20.0]) for row in CHAT_ROWS[:3]] for first in (-10.0, -30.0)]
    trainer = trainer_of(tokenizer, make_args(), evaluated=rows[0])
    trainer._remembered = Remembered(2**20)
    found = [trainer.evaluate(Dataset.from_list(one))["eval_rewards/chosen"] for one in rows]
    assert found[1] - found[0] == pytest.approx(0.1 * 20, abs=1e-4)


def test_an_evaluation_outside_a_training_keeps_nothing(tokenizer, make_args, monkeypatch):
    monkeypatch.setattr(Remembered, "of", lambda *given: pytest.fail("remembered"))
    trainer = trainer_of(tokenizer, make_args())
    assert isinstance(trainer.data_collator, GroupCollator)
    assert trainer.evaluate()["eval_rewards/ties"] == 1
