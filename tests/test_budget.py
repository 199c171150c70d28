"""When memory runs out: the same gradient and log in smaller forwards, or one clear error and a checkpoint."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from qlora_dpo import QLoRADPOTrainer
from qlora_dpo.budget import longest_rows
from qlora_dpo.errors import OutOfMemoryError, is_out_of_memory
from qlora_dpo.layouts import group_of, positions

from one_step import RANKED, KeepGradients
from test_trainer import policy_of
from tiny_chat import CHAT_ROWS, ranked_row

"""About the positions of one prompt with one completion in RANKED: below it nothing can be cut."""


class Memory:
    """A device that has room for forwards of so many positions."""

    def __init__(self, monkeypatch, most, only_backward=False, error=torch.OutOfMemoryError):
        self.refused, self.most = [], most
        from qlora_dpo import forward

        real = forward._score_part

        def limited(model, part, *args):
            tokens = part["input_ids"].numel()
            if tokens > self.most and (torch.is_grad_enabled() or not only_backward):
                self.refused.append(tokens)
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(model, part, *args)

        monkeypatch.setattr(forward, "_score_part", limited)


def run(tokenizer, make_args, rows=RANKED, **options):
    keep = KeepGradients()
    defaults = {"max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-3, "reference": "base", "max_length": None}
    defaults |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = QLoRADPOTrainer(
        policy_of(tokenizer, random_b=True),
        args=make_args(**(defaults | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    return trainer, keep


def ready(trainer):
    """Past the checks at the start, which score the longest group without gradient."""
    trainer._prove()
    trainer.model.train()
    trainer._check_start()


def test_the_checks_at_the_start_keep_to_the_token_budget(tokenizer, make_args, monkeypatch):
    """The longest and the shortest group, tried together, are more than that; no row alone is."""
    trainer, _ = run(tokenizer, make_args, max_tokens_per_forward=30)
    assert positions(trainer._sample(), "tree") > 30
    memory = Memory(monkeypatch, 30)
    ready(trainer)
    assert memory.refused == []
    assert trainer.data_collator.layout == "tree"


@pytest.mark.parametrize("layout", ["auto", "tree", "packed", "padded"])
def test_no_room_for_the_checks_at_the_start_is_said_and_no_fault_of_the_layout(
    tokenizer, make_args, monkeypatch, layout
):
    trainer, _ = run(tokenizer, make_args, batch_layout=layout)
    Memory(monkeypatch, 30)
    with pytest.raises(OutOfMemoryError, match=r"scored before anything else, got: CUDA out of memory.*Lower"):
        ready(trainer)


def lines(trainer):
    left_out = ("per_second", "gib", "unique_tokens")  # a prompt that is cut is placed in each part
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return [{key: value for key, value in line.items() if not key.endswith(left_out)} for line in logs]


OBJECTIVES = {
    "sigmoid": {},
    "coupled": {"loss_type": ["aot"]},
    "running mean": {"loss_type": ["bco_pair"], "bco_running_mean": True},
}


@pytest.mark.parametrize("only_backward", [False, True], ids=["any forward", "policy's forward"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_that_runs_out_of_memory_is_the_same_step(tokenizer, make_args, monkeypatch, objective, only_backward):
    """Room for 40 positions, where groups have 13 to 32 and micro-batches of two up to 60."""
    whole, kept = run(tokenizer, make_args, **OBJECTIVES[objective])
    whole.train()
    rescued, again = run(tokenizer, make_args, **OBJECTIVES[objective])
    ready(rescued)
    memory = Memory(monkeypatch, 40, only_backward)
    with pytest.warns(UserWarning, match=r"Memory ran out on a forward of \d+ tokens \(row [\d, ]+ of the data\)"):
        rescued.train()
    assert memory.refused
    assert rescued.data_collator.max_tokens <= 40
    for one, other in zip(kept.gradients, again.gradients, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()
    for line, expected in zip(lines(rescued), lines(whole), strict=True):
        assert line == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items()}


def test_kept_layers_are_given_up_before_forwards_are_cut(tokenizer, make_args, monkeypatch):
    """Room for no forward while a layer keeps its activations: the layers recompute, and no budget is set."""
    expected = run(tokenizer, make_args)
    expected[0].train()
    trainer, keep = run(tokenizer, make_args, keep_layers=2)
    ready(trainer)
    memory = Memory(monkeypatch, 0)
    keep_fewer = trainer.kept.keep_fewer

    def give_back():
        given = keep_fewer()
        memory.most = 0 if trainer.kept.count else 10_000
        return given

    trainer._rescue.keep_fewer = give_back
    with pytest.warns(UserWarning, match="Memory ran out on a forward of .* tokens .row .* fewer layers kept"):
        trainer.train()
    assert len(memory.refused) == 2
    assert trainer.kept.count == 0
    assert all(layer.gradient_checkpointing for layer in trainer.kept.layers)
    assert trainer.data_collator.max_tokens is None
    assert len(keep.gradients) == 2
    for one, other in zip(keep.gradients, expected[1].gradients, strict=True):
        assert torch.equal(one, other)


def test_the_budget_stays_and_memory_runs_out_no_more(tokenizer, make_args, monkeypatch):
    trainer, _ = run(tokenizer, make_args, max_steps=4)
    ready(trainer)
    memory = Memory(monkeypatch, 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "Memory ran out" in str(w.message)]
    assert len(said) == len(memory.refused) <= 2
    assert f"max_tokens_per_forward={trainer.data_collator.max_tokens}," in said[-1]


def test_what_cannot_be_cut_ends_with_the_row_and_a_checkpoint(tokenizer, make_args, monkeypatch):
    trainer, _ = run(tokenizer, make_args, max_steps=4, train_sampling_strategy="sequential")
    ready(trainer)
    memory = Memory(monkeypatch, 10_000)

    class Less(KeepGradients):
        def on_step_end(self, args, state, control, **kwargs):
            memory.most = 3

    trainer.add_callback(Less())
    with (
        pytest.warns(UserWarning, match="Memory ran out"),
        pytest.raises(OutOfMemoryError, match=r"one prompt with one completion \(row \d.*Lower `max_length`.*plan`"),
    ):
        trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-1")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 1
    assert (checkpoint / "adapter_model.safetensors").is_file()
    seen = json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"]
    assert seen == next(line["num_tokens"] for line in trainer.state.log_history if line["step"] == 1)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_an_evaluation_goes_on_in_smaller_forwards(tokenizer, make_args, monkeypatch):
    rows = [ranked_row(seed, count) for seed, count in enumerate([3, 5, 2, 4])]
    found = []
    for most in (10_000, 30):
        trainer, _ = run(tokenizer, make_args, rows, per_device_eval_batch_size=4)
        ready(trainer)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            memory = Memory(patch, most)
            found.append(trainer.evaluate(Dataset.from_list(rows)))
        assert bool(memory.refused) == (most == 30)
    for key in ("eval_loss", "eval_rewards/margins", "eval_kl/chosen", "eval_logps/rejected"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5)


def test_the_longest_groups_are_tried_first_and_leave_no_trace(tokenizer, make_args, monkeypatch):
    trainer, _ = run(tokenizer, make_args)
    ready(trainer)
    seen = []
    micro_batch = trainer._micro_batch
    monkeypatch.setattr(trainer, "_micro_batch", lambda m, x, n: (seen.append(x["groups"]), micro_batch(m, x, n))[1])
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trainer._try_longest()
    assert torch.equal(torch.rand(2), expected)
    sizes = [positions([group_of(row)], "padded") for row in trainer.train_dataset]
    assert len(seen[0]) == 2
    tokens = [len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in map(group_of, trainer.train_dataset)]
    assert sorted(tokens)[-2:] == sorted(len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in seen[0])
    assert max(sizes) > 0
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer._sums.take() is None
    assert longest_rows(trainer.train_dataset, 99) == sorted(range(len(tokens)), key=lambda i: -tokens[i])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_which_errors_mean_that_memory_ran_out(error, said):
    assert is_out_of_memory(error) == said


def test_other_errors_are_raised_as_they_are(tokenizer, make_args, monkeypatch):
    trainer, _ = run(tokenizer, make_args, CHAT_ROWS)
    ready(trainer)
    Memory(monkeypatch, 3, error=lambda text: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
