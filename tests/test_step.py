"""What a step does beside its numbers, which other files compare."""

from dataclasses import replace

import pytest
import torch

from qlora_dpo.forward import install_scoring
from qlora_dpo.layouts import make_batch
from qlora_dpo.metrics import RunningSums
from qlora_dpo.objective import Objective
from qlora_dpo.reference import BaseReference
from qlora_dpo.step import Step

from random_rows import random_groups
from tiny_models import add_lora, build


@pytest.mark.parametrize("given", [False, True])
def test_a_step_makes_no_tensor_on_the_device_from_numbers_of_the_host(monkeypatch, given):
    """Such a copy waits until the device has done all that was asked of it before."""
    policy = add_lora(build("llama"))
    install_scoring(policy.get_base_model())
    step = Step(BaseReference(policy), Objective(hyperparameters={"beta": 0.1}), 0.1)
    groups = random_groups(1)
    if given:
        groups = [
            replace(group, weights=[1.0] * len(group.pairs), ref_logps=[-1.0] * len(group.completion_ids))
            for group in groups
        ]
    batch, make = make_batch(groups, "tree"), torch.tensor

    def on_the_host(*args, device=None, **named):
        assert device is None
        return make(*args, **named)

    monkeypatch.setattr("torch.tensor", on_the_host)
    losses, table = step.losses(policy, batch)
    losses.sum().backward()
    sums = RunningSums()
    sums.add(table, batch["num_unique_tokens"])
    assert sums.take()[1:] == (len(batch["rows"]), batch["num_unique_tokens"])
