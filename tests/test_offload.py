"""What lies in CPU memory instead of the device's: the same losses and gradients, and weights that stay in place."""

import contextlib

import pytest
import torch

from qlora_dpo import load_policy, trainer
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.layouts import LAYOUTS, Group, make_batch
from qlora_dpo.model import checkpoint_activations
from qlora_dpo.offload import activations_moved

from one_step import one_step
from tiny_models import add_lora, build

GROUPS = [
    Group([9, 12, 14], [[10, 11, 8, 2], [13, 9, 2]], [(0, 1)]),
    Group([20, 9], [[10, 2], [15, 16, 17, 2], [9, 2]], [(1, 0), (1, 2)]),
]


class Elsewhere:
    """A fake other memory: copies with the same numbers in other places, and a note of what came and went."""

    def __init__(self):
        self.sizes, self.storages, self.returned = [], [], 0

    def __call__(self, tensor):
        copy = tensor.clone()
        self.sizes.append(tensor.nbytes)
        self.storages.append(tensor.untyped_storage().data_ptr())

        def bring_back():
            self.returned += 1
            return copy.clone()

        return bring_back


def gradient(policy, layout, moved=None, least_bytes=1):
    policy.zero_grad()
    policy.train()
    context = activations_moved(policy, "cpu", least_bytes, moved) if moved else contextlib.nullcontext()
    with context:
        total = score_batch(policy, make_batch(GROUPS, layout))["logps"].sum()
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def weight_storages(policy):
    tensors = [*policy.parameters(), *policy.buffers()]
    states = [p.quant_state for p in policy.parameters() if getattr(p, "quant_state", None) is not None]
    constants = [t for state in states for t in (state.absmax, state.code, state.state2.absmax)]
    return {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *constants)}


@pytest.fixture(params=["4 bit", "16 bit", "fp32", "mixture"])
def policy(request, base_folder):
    torch.manual_seed(0)
    if request.param in ("fp32", "mixture"):
        policy = add_lora(build("llama" if request.param == "fp32" else "mixtral"))
    else:
        policy = load_policy(base_folder, quantize=request.param == "4 bit", gradient_checkpointing=False)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    install_scoring(policy.get_base_model())
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_activations_leave_the_gradient_as_it_is_and_no_weight_is_moved(policy, layout, checkpointing):
    if checkpointing:
        checkpoint_activations(policy)
    expected, moved = gradient(policy, layout), Elsewhere()
    assert torch.equal(gradient(policy, layout, moved), expected)
    assert len(moved.sizes) >= 2
    assert moved.returned >= len(moved.sizes) / 2
    assert not set(moved.storages) & weight_storages(policy)


def test_with_checkpointing_the_inputs_of_layers_are_moved_and_little_else(base_folder):
    policy = load_policy(base_folder)
    install_scoring(policy.get_base_model())
    recomputed, kept = Elsewhere(), Elsewhere()
    gradient(policy, "tree", recomputed)
    policy.get_base_model().model.layers[1].gradient_checkpointing = False
    gradient(policy, "tree", kept)
    assert len(kept.sizes) > len(recomputed.sizes) + 10


def test_small_tensors_and_those_of_other_devices_stay(policy):
    everything, large, elsewhere = Elsewhere(), Elsewhere(), Elsewhere()
    gradient(policy, "tree", everything)
    bound = sorted(everything.sizes)[len(everything.sizes) // 2]
    gradient(policy, "tree", large, least_bytes=bound)
    assert sorted(large.sizes) == [size for size in sorted(everything.sizes) if size >= bound]
    with activations_moved(policy, "cuda", 1, elsewhere):
        score_batch(policy, make_batch(GROUPS, "tree"))["logps"].sum().backward()
    assert not elsewhere.sizes


def test_nothing_is_moved_without_gradient(policy):
    moved = Elsewhere()
    with torch.no_grad(), activations_moved(policy, "cpu", 1, moved):
        score_batch(policy, make_batch(GROUPS, "tree"))
    assert not moved.sizes


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens_per_forward": 12}, {"loss_type": "aot"}, {"keep_layers": 1}, {"gradient_checkpointing": False}],
    ids=str,
)
def test_a_training_step_with_offloading_has_the_same_loss_and_gradient(options, monkeypatch):
    """The trainer's own step, with the CPU in the part of the device."""
    (expected,), log = one_step(**options)
    moved = Elsewhere()
    monkeypatch.setattr(QLoRADPOConfig, "_check_memory", lambda self: None)
    monkeypatch.setattr(trainer, "activations_moved", lambda model: activations_moved(model, "cpu", 1, moved))
    (found,), found_log = one_step(activation_offloading=True, **options)
    assert torch.equal(found, expected)
    assert found_log[0]["loss"] == log[0]["loss"]
    assert moved.returned >= len(moved.sizes) / 2 > 0


def saved(function, x, least_bytes=1):
    """What a function's backward pass is given, and how many bytes went elsewhere."""
    given, moved = [], Elsewhere()

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            given.append(ctx.saved_tensors[0])
            return upstream

    x = x.requires_grad_()
    view = function(x)
    with activations_moved(torch.nn.Identity(), "cpu", least_bytes, moved):
        y = Keep.apply(view)
    y.sum().backward()
    return view.detach(), given[0], moved


@pytest.mark.parametrize(
    ("function", "moved_bytes"),
    [
        (lambda x: x * 1, 96),
        (lambda x: (x * 1).t(), 96),
        (lambda x: x[:, 1:3] * 1, 48),
        (lambda x: (x * 1)[:, 1:3], 48),
        (lambda x: (x * 1)[:, None].expand(6, 5, 4), 96),
        (lambda x: (x * 1)[:, 1:2].expand(6, 4), 24),
    ],
)
def test_a_view_comes_back_with_the_numbers_and_the_strides_it_had(function, moved_bytes):
    """Kernels choose how to sum by the strides they find; repeated rows travel once."""
    before, after, moved = saved(function, torch.randn(6, 4))
    assert torch.equal(before, after)
    assert before.stride() == after.stride()
    assert before.data_ptr() != after.data_ptr()
    assert moved.sizes == [moved_bytes]


def test_overlapping_windows_stay():
    before, after, moved = saved(lambda x: (x * 1).flatten().unfold(0, 3, 1), torch.randn(6, 4))
    assert torch.equal(before, after)
    assert not moved.sizes
