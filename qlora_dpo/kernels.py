"""Attention of one row by the kernel that takes the case at hand, and the plain loop over segments that all must equal.

Legend: h query heads, g key/value heads, L positions of the row, q queries and k keys of one segment, K keys of all
segments together, d and d_v head sizes of queries and values.
"""

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from qlora_dpo.blockwise import blockwise_attention
from qlora_dpo.errors import is_out_of_memory
from qlora_dpo.layouts import Segment
from qlora_dpo.segments import EndToEnd, RowPlan, expanded, keys_of

VARLEN, FLASH_ATTN, FLEX, FLEX_SMALL = "varlen", "flash_attn", "flex", "flex_small_tiles"
BLOCKWISE, SEGMENTS = "blockwise", "segments"
BF16_PRODUCTS = "bf16_products"
"""That the CPU multiplies matrices of bf16 at a speed worth having; beside the kernels among what is installed."""


@dataclass(frozen=True)
class Recipe:
    """How a layer makes weights of queries and keys.

    Attributes:
        scale: Factor on the scores; None for d^-1/2.
        window: Positions a query sees, itself included; None for all.
        dropout: Probability of dropping a weight.
        softcap: c of c tanh(score / c); None for none.
        sinks: `(h,)` logits of a sink that takes part in the softmax and has no value; None for none.
    """

    scale: float | None = None
    window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


@torch.compiler.disable
def attend(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, recipe: Recipe) -> Tensor:
    """Attention of one row: each segment sees its prefix and, causally, itself.

    A compiled model calls it uncompiled: traced, it would be compiled anew for each row's segments.

    Args:
        query: `(1, h, L, d)`.
        key: `(1, g, L, d)`.
        value: `(1, g, L, d_v)`.
        plan: The segments of the row, in order and without gaps.
        recipe: What the layer does to its scores.

    Returns:
        `(1, L, h, d_v)`.
    """
    device_type = query.device.type
    if device_type not in ("cuda", "cpu"):
        return by_segment(query, key, value, plan, recipe)
    if torch.is_autocast_enabled(device_type):  # which SDPA obeys by itself, and the kernels do not
        query, key, value = (_narrowed(x, torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    return IMPLEMENTATIONS[implementation_for(_case(query, key, value, recipe))](query, key, value, plan, recipe)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype is torch.float32 else x


# The implementations: each takes what `attend` takes and returns what it returns.


def by_segment(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, recipe: Recipe) -> Tensor:
    """One call of SDPA for each segment, or attention written out where SDPA does not know how: the slow truth."""
    key, value = expanded(key, query.shape[1], 1), expanded(value, query.shape[1], 1)
    explicit = recipe.softcap is not None or recipe.sinks is not None
    outputs = []
    for segment, mask in zip(plan.segments, plan.masks(recipe.window, query.device), strict=True):
        queries = query[:, :, segment.start : segment.start + segment.length]
        keys, values = keys_of(key, segment), keys_of(value, segment)
        if explicit:
            outputs.append(explicit_attention(queries, keys, values, mask, recipe))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=mask,
                    dropout_p=recipe.dropout,
                    is_causal=mask is None,
                    scale=recipe.scale,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, recipe: Recipe) -> Tensor:
    """Softmax attention written out, for soft-caps (Gemma 2) and sinks (gpt-oss), which SDPA does not take.

    Args:
        query: `(1, h, q, d)`.
        key: `(1, h, k, d)`.
        value: `(1, h, k, d_v)`.
        mask: `(q, k)`, True where a query may look; None for causal. It says what the recipe's window says.
        recipe: What is done to the scores.

    Returns:
        `(1, h, q, d_v)`.
    """
    scale = query.shape[-1] ** -0.5 if recipe.scale is None else recipe.scale
    scores = query @ key.transpose(-1, -2) * scale
    if recipe.softcap is not None:
        scores = torch.tanh(scores / recipe.softcap) * recipe.softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if recipe.sinks is not None:
        sinks = recipe.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float64 if scores.dtype is torch.float64 else torch.float32)
    weights = F.dropout(weights[..., : key.shape[2]].to(value.dtype), recipe.dropout)
    return weights @ value


def by_torch_varlen(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, recipe: Recipe) -> Tensor:
    """One call of PyTorch's flash attention for sequences of different lengths."""
    run = torch_varlen()
    assert run is not None
    row = plan.end_to_end(query.device)
    queries, keys, values = _laid(query, key, value, row)
    named: dict[str, Any] = {}
    if _takes(run, "enable_gqa"):
        named["enable_gqa"] = queries.shape[1] != keys.shape[1]
    else:
        keys, values = expanded(keys, queries.shape[1], 1), expanded(values, queries.shape[1], 1)
    lengths = (row.cu_q, row.cu_k, row.max_q, row.max_k)
    window = _left_and_right(recipe.window, row.max_k)
    return run(queries, keys, values, *lengths, scale=recipe.scale, window_size=window, **named)[None]


def by_flash_attn(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, recipe: Recipe) -> Tensor:
    """One call of the package flash-attn."""
    run = flash_attn_varlen()
    assert run is not None
    row = plan.end_to_end(query.device)
    queries, keys, values = _laid(query, key, value, row)
    return run(
        queries,
        keys,
        values,
        cu_seqlens_q=row.cu_q,
        cu_seqlens_k=row.cu_k,
        max_seqlen_q=row.max_q,
        max_seqlen_k=row.max_k,
        dropout_p=recipe.dropout,
        softmax_scale=recipe.scale,
        causal=True,
        window_size=_left_and_right(recipe.window, row.max_k),
    )[None]


def _laid(query: Tensor, key: Tensor, value: Tensor, row: EndToEnd) -> tuple[Tensor, Tensor, Tensor]:
    """`(L, h, d)`, `(K, g, d)` and `(K, g, d_v)`: the row without its batch dimension, its keys gathered by segment."""
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    return queries, row.gather(keys), row.gather(values)


def _left_and_right(window: int | None, max_k: int) -> tuple[int, int]:
    """How far a query sees to its left and right beside itself, -1 for without end; causal aligns to the lower right.

    >>> _left_and_right(4, 10), _left_and_right(None, 10)
    ((3, 0), (-1, 0))
    """
    return (-1 if window is None or window >= max_k else window - 1, 0)


FLEX_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""Rows below 128 positions would get a kernel for decoding, which does not compile for most groups of query heads."""

SMALL_TILES = FLEX_OPTIONS | {
    **{"num_stages": 1, "num_warps": 4, "fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16},
    **{f"bwd_BLOCK_{side}": 16 for side in ("M1", "N1", "M2", "N2")},
}
"""For devices with less shared memory than PyTorch's own tiles take: 99 KiB a block at capability 8.6 and 8.9, where
its backward pass has tiles of 64 positions, of 128 KiB with heads of 256. These are 64 KiB there in fp32."""


def by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RowPlan,
    recipe: Recipe,
    options: Mapping[str, int] = FLEX_OPTIONS,
) -> Tensor:
    """One call of FlexAttention, which takes soft-caps, fp32, any head size, and sinks by its log-sum-exp.

    A sink adds e^sink to the softmax's denominator e^lse: its output is that without the sink times s(lse - sink).
    """
    found = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if recipe.softcap is None else _capped(recipe.softcap, query.device),
        block_mask=plan.block_mask(recipe.window, query.device),
        scale=recipe.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if recipe.sinks is None else AuxRequest(lse=True),
        kernel_options=dict(options),
    )
    if recipe.sinks is not None:
        output, aux = found
        found = output * torch.sigmoid(aux.lse - recipe.sinks[None, :, None])[..., None].to(output.dtype)
    return found.transpose(1, 2).contiguous()


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    """FlexAttention, compiled where it is a kernel; as it is on a CPU, for tests of its values."""
    if device_type == "cpu":
        return flex_attention
    return _compiled(flex_attention, "inductor")


def _compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """A function compiled as often as its arguments ask for.

    Beyond 8 kinds of arguments Dynamo would run it uncompiled, and FlexAttention would then hold all scores. A model
    needs few kinds: rows of one block or more, with gradient or without, and each of its head sizes and scales.
    Numbers are compiled in, so that another scale is another kind and not a symbol, which is a way less travelled.
    """
    run = torch.compile(function, backend=backend)

    @functools.wraps(function)
    def compiled(*args: Any, **named: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
            return run(*args, **named)

    return compiled


@functools.cache
def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """What FlexAttention does to a score. The cap is a tensor, as numbers that a function holds may be compiled in."""
    cap = torch.tensor(softcap, device=device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


def by_block(query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, recipe: Recipe) -> Tensor:
    """Matrix products and softmax, a block of queries at a time."""
    return blockwise_attention(query, key, value, plan.segments, recipe.scale, recipe.window)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    VARLEN: by_torch_varlen,
    FLASH_ATTN: by_flash_attn,
    FLEX: by_flex,
    FLEX_SMALL: functools.partial(by_flex, options=SMALL_TILES),
    BLOCKWISE: by_block,
    SEGMENTS: by_segment,
}
"""Implementations by name."""


# The choice among them.


@dataclass(frozen=True)
class Case:
    """What decides which implementation runs.

    Attributes:
        device: Where the row is.
        capability: Compute capability of a CUDA device, as `(9, 0)`; None for other devices.
        dtype: Of queries, keys and values.
        heads: h and g.
        head_sizes: d and d_v.
        softcap: Soft-cap on the scores; None for none.
        sinks: Whether there are sinks.
        dropout: Whether weights are dropped.
    """

    device: torch.device
    capability: tuple[int, int] | None
    dtype: torch.dtype
    heads: tuple[int, int]
    head_sizes: tuple[int, int]
    softcap: float | None = None
    sinks: bool = False
    dropout: bool = False


def _case(query: Tensor, key: Tensor, value: Tensor, recipe: Recipe) -> Case:
    return Case(
        device=query.device,
        capability=torch.cuda.get_device_capability(query.device) if query.device.type == "cuda" else None,
        dtype=query.dtype,
        heads=(query.shape[1], key.shape[1]),
        head_sizes=(query.shape[-1], value.shape[-1]),
        softcap=recipe.softcap,
        sinks=recipe.sinks is not None,
        dropout=recipe.dropout > 0,
    )


def choose(case: Case, installed: frozenset[str]) -> str:
    """Name of the implementation for a case, among those installed; `SEGMENTS` takes every case.

    Flash kernels take 16-bit numbers and heads of one size, a multiple of 8 up to 256, and neither soft-cap nor sinks;
    PyTorch's takes no dropout. FlexAttention takes no dropout, no fp64 and no head below 16; where its tiles are too
    large for the device, smaller ones are next. All of them are written for CUDA devices of capability 8.0 and above.
    On a CPU attention by blocks takes what SDPA takes, in bf16 and fp32.
    """
    size, value_size = case.head_sizes
    plain = case.softcap is None and not case.sinks
    if case.device.type == "cpu" and BLOCKWISE in installed and plain and size == value_size and not case.dropout:
        fast = case.dtype is torch.float32 or (case.dtype is torch.bfloat16 and BF16_PRODUCTS in installed)
        return BLOCKWISE if fast else SEGMENTS
    if case.device.type != "cuda" or case.capability is None or case.capability < (8, 0):
        return SEGMENTS
    half = case.dtype in (torch.float16, torch.bfloat16)
    if plain and half and size == value_size and size % 8 == 0 and size <= 256:
        if VARLEN in installed and not case.dropout:
            return VARLEN
        if FLASH_ATTN in installed:
            return FLASH_ATTN
    if not case.dropout and (half or case.dtype is torch.float32) and min(case.head_sizes) >= 16:
        return next((name for name in (FLEX, FLEX_SMALL) if name in installed), SEGMENTS)
    return SEGMENTS


@functools.cache
def implementation_for(case: Case) -> str:
    """The implementation that is chosen for a case and shown to work on this machine.

    One that raises or gives other numbers than `SEGMENTS` on a small trial is warned about and never used.
    """
    left = installed_kernels()
    while (name := choose(case, left)) != SEGMENTS:
        problem = _in_a_thread(trial, name, case)
        if problem is None:
            break
        warnings.warn(f"Attention does without the kernel '{name}' on {case.device}: {problem}", stacklevel=2)
        left -= {name}
    return name


@functools.cache
def installed_kernels() -> frozenset[str]:
    """Names of the kernels that this installation has; none of a GPU's for AMD devices, where they are untried."""
    nvidia = torch.version.hip is None
    there = {
        VARLEN: nvidia and torch_varlen() is not None and torch.backends.cuda.is_flash_attention_available(),
        FLASH_ATTN: nvidia and flash_attn_varlen() is not None,
        **dict.fromkeys((FLEX, FLEX_SMALL), nvidia and importlib.util.find_spec("triton") is not None),
        BLOCKWISE: True,
        BF16_PRODUCTS: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    return frozenset(name for name, found in there.items() if found)


@functools.cache
def torch_varlen() -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn`, if it has a window; before torch 2.11 it had none."""
    try:
        run = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return run if _takes(run, "window_size") else None


@functools.cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


@functools.cache
def flash_attn_varlen() -> Callable[..., Tensor] | None:
    """`flash_attn_varlen_func` of the package flash-attn, if it is installed and was built for this torch."""
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None


TRIAL_SEGMENTS = (
    Segment(0, 150),
    Segment(150, 40, 0, 100),
    Segment(190, 1, 0, 100),
    Segment(191, 1),
    Segment(192, 60, 191, 1),
)
"""Two prompts, of 100 tokens and of one, with completions: a row of more than one block."""

TRIALS = (
    (TRIAL_SEGMENTS, None),
    (TRIAL_SEGMENTS, 30),
    ((Segment(0, 130), Segment(130, 200, 0, 130), Segment(330, 51, 0, 130)), None),
    ((Segment(0, 40), Segment(40, 30, 0, 40), Segment(70, 29, 0, 40)), None),
)
"""Rows and windows: kernels that are compiled meet another length of several blocks, and one of less than a block."""

TRIAL_TOLERANCE = 0.05
"""Allowed difference, as a share of the largest value: several roundings of bf16, far less than a wrong mask makes."""


def trial(name: str, case: Case) -> str | None:
    """Values and gradients of an implementation against `SEGMENTS` in fp32, on small rows of its own.

    Args:
        name: The implementation.
        case: Its device, dtype, heads and rules are tried; dropout is left out, as its values are random.

    Returns:
        Why the implementation must not be used; None if it may.
    """
    generator = torch.Generator().manual_seed(0)
    (heads, kv_heads), (size, value_size) = case.heads, case.head_sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    recipe = Recipe(scale=1.5 * size**-0.5, softcap=case.softcap, sinks=draw(heads) if case.sinks else None)
    for segments, window in TRIALS:
        length, asked = segments[-1].start + segments[-1].length, replace(recipe, window=window)
        inputs = [draw(1, n, length, d) for n, d in ((heads, size), (kv_heads, size), (kv_heads, value_size))]
        cotangent = draw(1, length, heads, value_size)
        try:
            found = _value_and_gradients(IMPLEMENTATIONS[name], segments, inputs, cotangent, asked)
        except Exception as error:
            if is_out_of_memory(error):  # says nothing about the kernel
                raise
            return f"{type(error).__name__}: {error}"
        truth = _value_and_gradients(by_segment, segments, [x.float() for x in inputs], cotangent.float(), asked)
        for ours, theirs in zip(found, truth, strict=True):
            difference = (ours.float() - theirs).abs().max() / theirs.abs().max()
            if not difference <= TRIAL_TOLERANCE:
                return f"its numbers are off by {difference:.3g} of the largest ({length} positions, window {window})"
    return None


def _value_and_gradients(
    run: Callable[..., Tensor], segments: Sequence[Segment], inputs: list[Tensor], cotangent: Tensor, recipe: Recipe
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = run(*leaves, RowPlan(segments), recipe)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent)


def _in_a_thread(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns when called in a thread of its own.

    Gradient mode, autocast and the hooks of checkpointing belong to a thread: a trial inside a layer that is
    checkpointed, or without gradient, would otherwise run under the layer's.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function, *args).result()
