"""Every implementation of attention equals the loop over segments, as far as a CPU can tell; and which one is chosen.

The flash kernels are replaced by a slow function with their contract, written from their documentation. What they do on
a GPU is in test_gpu.py.
"""

import functools
import math
import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions
from torch.utils.checkpoint import checkpoint

from qlora_dpo import kernels
from qlora_dpo.forward import install_scoring, score_batch
from qlora_dpo.kernels import (
    BF16_PRODUCTS,
    BLOCKWISE,
    FLASH_ATTN,
    FLEX,
    FLEX_SMALL,
    SEGMENTS,
    SMALL_TILES,
    VARLEN,
    Case,
    Recipe,
    by_flash_attn,
    by_flex,
    by_segment,
    by_torch_varlen,
    choose,
    trial,
)
from qlora_dpo.layouts import Segment, make_batch
from qlora_dpo.recompute import checkpoint_activations
from qlora_dpo.segments import BLOCK, RowPlan

from random_rows import random_groups
from tiny_models import add_lora, build

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALL = frozenset({VARLEN, FLASH_ATTN, FLEX})


# Stand-ins for the kernels


def slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window, shift=True):
    """Attention of sequences end to end, a query at a time.

    Query i of a sequence with n queries and m keys stands at i + m - n (lower right) and sees the keys from `window[0]`
    before it to `window[1]` behind it; -1 is without end.

    Args:
        query: `(total_q, h, d)`.
        key: `(total_k, h, d)`.
        value: `(total_k, h, d)`.
        cu_seq_q: `(S + 1,)` int32 ends of the sequences' queries, from 0.
        cu_seq_k: `(S + 1,)` int32, the same for keys.
        max_q: Most queries of a sequence.
        max_k: Most keys.
        scale: Factor on the scores; None for d^-1/2.
        window: Keys seen to the left and to the right.
        shift: False for a kernel that aligns to the upper left.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[0], cu_seq_q[-1], cu_seq_k[0], cu_seq_k[-1]) == (0, len(query), 0, len(key))
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert len(key) == len(value)
    assert query.shape[1] == key.shape[1]
    outputs = []
    for q0, q1, k0, k1 in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        for i in range(q1 - q0):
            position = int(i + (k1 - k0) - (q1 - q0)) if shift else i
            low = 0 if window[0] < 0 else max(0, position - window[0])
            high = int(k1 - k0) if window[1] < 0 else min(int(k1 - k0), position + window[1] + 1)
            seen = slice(int(k0) + low, int(k0) + high)
            scores = torch.einsum("hd,khd->hk", query[q0 + i], key[seen])
            scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(outputs)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert isinstance(window_size, tuple)  # torch compares it with (-1, 0) to see that it is causal
    return slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_13(query, key, value, *lengths, scale=None, window_size=(-1, -1), enable_gqa=False):
    """Key/value head j serves query heads j h/g to (j + 1) h/g - 1."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return torch_2_11(query, key, value, *lengths, scale=scale, window_size=window_size)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    assert dropout_p == 0
    window = (window_size[0], 0) if causal else window_size
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return slow_varlen(q, k, v, *lengths, softmax_scale, window)


def upper_left(query, key, value, *lengths, scale=None, window_size=(-1, -1), enable_gqa=False):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return slow_varlen(query, key, value, *lengths, scale, window_size, shift=False)


def broken(query, key, value, *lengths, scale=None, window_size=(-1, -1), enable_gqa=False):
    raise RuntimeError("no kernel image is available")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def wrong_gradient(query, *rest, **named):
    return torch_2_13(WrongGradient.apply(query), *rest, **named)


STAND_INS = {
    "torch 2.11": ("torch_varlen", torch_2_11, by_torch_varlen),
    "torch 2.13": ("torch_varlen", torch_2_13, by_torch_varlen),
    "flash-attn 2": ("flash_attn_varlen", flash_attn_2, by_flash_attn),
}


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in the place of a kernel."""

    def put(loader, function):
        monkeypatch.setattr(kernels, loader, lambda: function)

    return put


# Equal to the loop over segments


def row(segments, heads, kv_heads, size, seed=0, dtype=torch.float64):
    """Random queries, keys, values and a gradient of their output."""
    generator = torch.Generator().manual_seed(seed)
    length = segments[-1].start + segments[-1].length
    shapes = (
        (1, heads, length, size),
        (1, kv_heads, length, size),
        (1, kv_heads, length, size),
        (1, length, heads, size),
    )
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def value_and_gradients(run, segments, recipe, query, key, value, cotangent):
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = run(*leaves, RowPlan(segments), recipe)
    return output, *torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_one_varlen_call_equals_the_segments_one_by_one(stand_in, name, layout, window, heads, kv_heads):
    """Values and gradients in fp64 to 1e-12: gathering, lengths, windows, heads and scale."""
    loader, kernel, run = STAND_INS[name]
    stand_in(loader, kernel)
    for seed in range(2):
        segments = make_batch(random_groups(seed), layout)["segments"]
        recipe = Recipe(scale=None if seed else 0.7, window=window)
        inputs = row(segments, heads, kv_heads, 8, seed)
        found = value_and_gradients(run, segments, recipe, *inputs)
        truth = value_and_gradients(by_segment, segments, recipe, *inputs)
        for ours, theirs in zip(found, truth, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-12


def test_random_rows_hold_the_awkward_cases():
    """The check on the check above: prompts of one token, runs of one, and prompts longer than the windows."""
    trees = [make_batch(random_groups(seed), "tree")["segments"] for seed in range(2)]
    prefixes = {s.prefix_length for segments in trees for s in segments}
    assert 1 in prefixes
    assert max(prefixes) > 3
    assert any(s.length == 1 and s.prefix_length for segments in trees for s in segments)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_the_installed_torch_takes_what_its_kernel_is_given(heads, window):
    """The real operator on tensors without data: arguments, shapes, and that it has a backward."""
    segments = make_batch(random_groups(1), "tree")["segments"]
    inputs = [x.to("meta") for x in row(segments, *heads, 16, dtype=torch.bfloat16)]
    found = value_and_gradients(by_torch_varlen, segments, Recipe(window=window), *inputs)
    expected = (inputs[3], *inputs[:3])
    assert [x.shape for x in found] == [x.shape for x in expected]


@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_flex_attention_equals_attention_written_out(layout, window, softcap, sinks, heads, kv_heads):
    """Values in fp32; FlexAttention has no backward on a CPU."""
    segments = make_batch(random_groups(3), layout)["segments"]
    query, key, value, _ = row(segments, heads, kv_heads, 16, dtype=torch.float32)
    recipe = Recipe(0.7, window, 0.0, softcap, torch.linspace(-2, 2, heads) if sinks else None)
    truth = by_segment(query.double(), key.double(), value.double(), RowPlan(segments), recipe)
    for name in (FLEX, FLEX_SMALL):
        assert (kernels.IMPLEMENTATIONS[name](query, key, value, RowPlan(segments), recipe) - truth).abs().max() < 1e-5


def test_small_tiles_are_options_that_flex_attention_has_and_parts_of_its_blocks():
    known = FlexKernelOptions.__annotations__
    assert {name.removeprefix("fwd_").removeprefix("bwd_") for name in SMALL_TILES} <= set(known)
    assert all(BLOCK % size == 0 for name, size in SMALL_TILES.items() if "BLOCK" in name)


def test_flex_attention_is_compiled_for_more_kinds_of_arguments_than_dynamo_allows():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    double = kernels._compiled(lambda x: 2 * x, counter)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32):
        for x in (torch.ones(3, dtype=dtype), torch.ones(3, 3, dtype=dtype)):
            double(x)
    assert counter.frame_count == 14


def test_another_scale_is_compiled_anew_and_not_as_a_symbol():
    """With a number as a symbol the third call would find what the second compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    scaled = kernels._compiled(lambda x, scale: scale * x, counter)
    assert [scaled(torch.ones(1), scale).item() for scale in (0.5, 0.25, 0.125)] == [0.5, 0.25, 0.125]
    assert counter.frame_count == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_flex_attention_skips_no_block_it_needs(monkeypatch):
    """Compiled for a CPU, without sinks, which that cannot do: rows of 1 to 17 blocks in turn, compiled 3 times."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    compiled = kernels._compiled(kernels.flex_attention, counter)
    monkeypatch.setattr(kernels, "_flex", lambda _: compiled)
    for seed, scale in enumerate((60, 10, 1, 30, 40, 5)):
        segments = make_batch(random_groups(seed, scale), "tree")["segments"]
        query, key, value, _ = row(segments, 4, 2, 16, dtype=torch.float32)
        for window in (None, 20):
            recipe = Recipe(scale=0.3, window=window, softcap=5.0)
            truth = by_segment(query, key, value, RowPlan(segments), recipe)
            assert (by_flex(query, key, value, RowPlan(segments), recipe) - truth).abs().max() < 1e-5
    assert counter.frame_count == 3


def test_flex_attention_takes_rows_of_several_blocks():
    segments = make_batch(random_groups(4, scale=40), "tree")["segments"]
    query, key, value, _ = row(segments, 2, 1, 16, dtype=torch.float32)
    assert query.shape[2] > 256
    recipe = Recipe(window=50, softcap=3.0)
    truth = by_segment(query, key, value, RowPlan(segments), recipe)
    assert (by_flex(query, key, value, RowPlan(segments), recipe) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("layout", ["tree", "packed"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_that_attends_in_one_call_gives_the_same_scores_and_gradients(
    stand_in, monkeypatch, name, layout, checkpointed
):
    policy = add_lora(build(name, torch.float64))
    install_scoring(policy.get_base_model())
    if checkpointed:
        checkpoint_activations(policy)
    batch = make_batch(random_groups(5), layout)

    def scored():
        policy.zero_grad()
        logps = score_batch(policy, batch)["logps"]
        logps.sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    truth = scored()
    stand_in("torch_varlen", torch_2_13)
    calls = []
    in_one_call = lambda *args: calls.append(args) or by_torch_varlen(*args)  # noqa: E731
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, SEGMENTS, in_one_call)
    found = scored()
    assert len(calls) >= policy.config.num_hidden_layers
    assert (found[0] - truth[0]).abs().max() < 1e-9
    assert (found[1] - truth[1]).norm() < 1e-6 * truth[1].norm()


# Which one is chosen


def case(**changes):
    plain = {"device": CUDA, "capability": (9, 0), "dtype": torch.bfloat16, "heads": (8, 2), "head_sizes": (128, 128)}
    return Case(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "installed", "name"),
    [
        ({}, ALL, VARLEN),
        ({"dtype": torch.float16, "capability": (8, 0)}, ALL, VARLEN),
        ({"head_sizes": (256, 256)}, ALL, VARLEN),
        ({}, {FLASH_ATTN, FLEX}, FLASH_ATTN),
        ({}, {FLEX}, FLEX),
        ({}, set(), SEGMENTS),
        ({"dropout": True}, ALL, FLASH_ATTN),
        ({"dropout": True}, {VARLEN, FLEX}, SEGMENTS),
        ({"softcap": 50.0}, ALL, FLEX),
        ({"softcap": 50.0}, {VARLEN, FLASH_ATTN}, SEGMENTS),
        ({"softcap": 50.0}, {FLEX, FLEX_SMALL}, FLEX),
        ({"softcap": 50.0}, {VARLEN, FLEX_SMALL}, FLEX_SMALL),
        ({"softcap": 50.0, "dropout": True}, {FLEX_SMALL}, SEGMENTS),
        ({"softcap": 50.0, "dropout": True}, ALL, SEGMENTS),
        ({"sinks": True}, ALL, FLEX),
        ({"sinks": True}, {VARLEN, FLASH_ATTN}, SEGMENTS),
        ({"sinks": True, "dropout": True}, ALL, SEGMENTS),
        ({"dtype": torch.float32}, ALL, FLEX),
        ({"dtype": torch.float32}, {VARLEN, FLASH_ATTN}, SEGMENTS),
        ({"dtype": torch.float32, "dropout": True}, ALL, SEGMENTS),
        ({"dtype": torch.float64}, ALL, SEGMENTS),
        ({"head_sizes": (512, 512)}, ALL, FLEX),
        ({"head_sizes": (264, 264)}, {VARLEN, FLASH_ATTN}, SEGMENTS),
        ({"head_sizes": (192, 128)}, ALL, FLEX),
        ({"head_sizes": (100, 100)}, ALL, FLEX),
        ({"head_sizes": (8, 8)}, ALL, VARLEN),
        ({"head_sizes": (8, 8), "softcap": 50.0}, ALL, SEGMENTS),
        ({"capability": (7, 5), "dtype": torch.float16}, ALL, SEGMENTS),
        ({"device": CPU, "capability": None}, ALL, SEGMENTS),
        ({"device": CPU, "capability": None}, {*ALL, BLOCKWISE}, SEGMENTS),
        ({"device": CPU, "capability": None}, {BLOCKWISE, BF16_PRODUCTS}, BLOCKWISE),
        ({"device": CPU, "capability": None, "dtype": torch.float32}, {BLOCKWISE}, BLOCKWISE),
        ({"device": CPU, "capability": None, "dtype": torch.float32}, ALL, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float32, "softcap": 50.0}, {BLOCKWISE}, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float32, "sinks": True}, {BLOCKWISE}, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float32, "dropout": True}, {BLOCKWISE}, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float32, "head_sizes": (192, 128)}, {BLOCKWISE}, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float64}, {BLOCKWISE, BF16_PRODUCTS}, SEGMENTS),
        ({"device": CPU, "capability": None, "dtype": torch.float16}, {BLOCKWISE, BF16_PRODUCTS}, SEGMENTS),
        ({"device": torch.device("mps"), "capability": None}, ALL, SEGMENTS),
    ],
)
def test_the_choice(changes, installed, name):
    assert choose(case(**changes), frozenset(installed)) == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8, 64, 128, 256, 264, 512])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_kernels_are_chosen_for_nothing_they_do_not_take(dtype, size, softcap, sinks, dropout):
    for installed in (ALL, {VARLEN}, {FLASH_ATTN}, {FLEX}, set()):
        asked = case(dtype=dtype, head_sizes=(size, size), softcap=softcap, sinks=sinks, dropout=dropout)
        chosen = choose(asked, frozenset(installed))
        assert chosen in {SEGMENTS, *installed}
        if dtype in (torch.float32, torch.float64) or softcap or sinks or size > 256:
            assert chosen not in (VARLEN, FLASH_ATTN)
        if dropout:
            assert chosen not in (VARLEN, FLEX)


def test_a_cpu_build_of_torch_never_counts_the_flash_kernel_as_installed():
    if not torch.backends.cuda.is_flash_attention_available():
        assert VARLEN not in kernels.installed_kernels()


def test_a_torch_without_onednn_multiplies_no_bf16_fast(monkeypatch):
    """As on macOS on ARM, where the question itself is an unknown operator."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", torch._ops._OpNamespace("no_such_library"))
    assert BF16_PRODUCTS not in kernels.installed_kernels.__wrapped__()


def test_a_torch_without_windows_has_no_varlen_kernel(monkeypatch):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", lambda query, key, value, is_causal=False: None)
    assert kernels.torch_varlen.__wrapped__() is None


def test_a_flash_attn_built_for_another_torch_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert kernels.flash_attn_varlen.__wrapped__() is None


# No kernel is used before it is shown to work

SMALL = case(device=CPU, capability=None, dtype=torch.float32, heads=(4, 2), head_sizes=(16, 16))


@pytest.fixture
def chosen(monkeypatch):
    """The choice for a small case if PyTorch's kernel were installed here."""
    monkeypatch.setattr(kernels, "installed_kernels", lambda: frozenset({VARLEN}))
    monkeypatch.setattr(kernels, "choose", lambda _, installed: VARLEN if VARLEN in installed else SEGMENTS)
    return functools.partial(kernels.implementation_for.__wrapped__, SMALL)


@pytest.mark.parametrize("kernel", [torch_2_11, torch_2_13])
def test_a_kernel_that_works_passes_its_trial(stand_in, kernel):
    stand_in("torch_varlen", kernel)
    assert trial(VARLEN, SMALL) is None


@pytest.mark.parametrize("sinks", [False, True])
def test_the_loop_over_segments_passes_its_own_trial_in_bf16(sinks):
    """The tolerance is wider than rounding."""
    assert trial(SEGMENTS, case(device=CPU, capability=None, softcap=5.0, sinks=sinks)) is None


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(upper_left, "off by"), (wrong_gradient, "off by"), (broken, "no kernel image is available")],
)
def test_a_kernel_that_fails_its_trial_is_warned_about_and_not_used(stand_in, chosen, kernel, reason):
    stand_in("torch_varlen", kernel)
    with pytest.warns(UserWarning, match=f"without the kernel 'varlen' on cpu: .*{reason}"):
        assert chosen() == SEGMENTS


def test_tiles_beyond_the_shared_memory_of_the_device_make_way_for_smaller_ones(monkeypatch):
    def too_large(*args):
        raise RuntimeError("out of resource: shared memory, Required: 131074, Hardware limit: 101376.")

    monkeypatch.setitem(kernels.IMPLEMENTATIONS, FLEX, too_large)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, FLEX_SMALL, by_segment)  # FlexAttention has no backward on a CPU
    monkeypatch.setattr(kernels, "installed_kernels", lambda: frozenset({FLEX, FLEX_SMALL}))
    monkeypatch.setattr(
        kernels, "choose", lambda _, there: next((name for name in (FLEX, FLEX_SMALL) if name in there), SEGMENTS)
    )
    with pytest.warns(UserWarning, match="without the kernel 'flex' on cpu: .*shared memory"):
        assert kernels.implementation_for.__wrapped__(SMALL) == FLEX_SMALL


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_memory_running_out_in_a_trial_is_no_verdict_on_the_kernel(stand_in, error):
    def hungry(*args, scale, window_size):
        raise error

    stand_in("torch_varlen", hungry)
    with pytest.raises(type(error), match=str(error)):
        trial(VARLEN, SMALL)


def test_a_trial_has_gradients_where_the_layer_has_none(stand_in, chosen):
    stand_in("torch_varlen", torch_2_13)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert chosen() == VARLEN


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trial_inside_a_checkpointed_layer_leaves_it_alone(stand_in, chosen, reentrant):
    stand_in("torch_varlen", torch_2_13)
    x = torch.ones(3, requires_grad=True)

    def layer(x):
        assert chosen() == VARLEN
        return (2 * x).exp()

    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert torch.allclose(x.grad, 2 * torch.ones(3).mul(2).exp())


def test_a_trial_draws_nothing_from_the_random_numbers_of_the_run(stand_in, chosen):
    stand_in("torch_varlen", torch_2_13)
    before = torch.get_rng_state()
    chosen()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rows_of_a_trial_show_a_wrong_prefix():
    """The check on the check: keys of the wrong run are off by far more than the tolerance."""
    segments = [Segment(0, 60), Segment(60, 20, 0, 30)]
    wrong = [Segment(0, 60), Segment(60, 20, 30, 30)]
    query, key, value, _ = row(segments, 2, 2, 16)
    right, other = (by_segment(query, key, value, RowPlan(s), Recipe()) for s in (segments, wrong))
    assert (right - other).abs().max() > 10 * kernels.TRIAL_TOLERANCE * right.abs().max()
