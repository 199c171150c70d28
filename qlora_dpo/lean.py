"""What lies between the matrix products of a decoder layer, keeping less for the backward pass.

Written as in transformers, a norm keeps its input in fp32, and a gated MLP keeps four tensors of its intermediate size:
gate, its activation, up, and their product. Here a norm keeps its input as it came, and the MLP gate and up; the rest
is computed again, element by element, when the backward pass is there. The forward pass computes the same bits, row
strip by row strip, so that what one operation wrote is still in the cache for the next.

A model's own code decides whether a module is one of these: its forward runs on a few random numbers with small
weights of our own, and only where ours gives the same bits does ours take its place.

Legend: N positions, H size of what is normalised, I intermediate size of the MLP.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_dpo.bare import is_bare
from qlora_dpo.lora import FastLinear4bit, Source

STRIP_BYTES = {"cpu": 2**19, "cuda": 2**23}
"""Of a tensor, worked on at a time: what a core's own cache holds with all that is made of it, or what a GPU is busy
with."""

# ---- norms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormRule:
    """How a norm by the root mean square applies its weight.

    Attributes:
        offset: Added to the weight (Gemma: 1).
        narrow_first: Whether the normalised input is narrowed to its own dtype before the weight is applied (Llama).
    """

    offset: float
    narrow_first: bool

    def apply(self, normed: Tensor, weight: Tensor, output: Tensor) -> None:
        """Fill the `(n, H)` output from normalised fp32 input."""
        if self.narrow_first:
            torch.mul(weight, normed.to(output.dtype), out=output)
        else:
            output.copy_((self.offset + weight.float() if self.offset else weight) * normed)


NORM_RULES = (NormRule(0.0, True), NormRule(0.0, False), NormRule(1.0, False))
"""As Llama, OLMo 2 and Gemma have it."""


def strip_rows(row_bytes: int, device: str) -> int:
    """Rows of so many bytes that are worked on at a time."""
    return max(1, STRIP_BYTES.get(device, STRIP_BYTES["cuda"]) // row_bytes)


def _strips(rows: Tensor, width: int) -> Iterator[slice]:
    """Parts of `(N, n)` rows, for work on numbers of `width` bytes."""
    length = strip_rows(rows.shape[-1] * width, rows.device.type)
    return (slice(first, first + length) for first in range(0, len(rows), length))


class _Norm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), with a frozen w; fp32 inside."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, eps: float, rule: NormRule) -> Tensor:
        """`(N, H)`."""
        output, scales = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for strip in _strips(rows, 4):
            wide = rows[strip].to(torch.float32)
            scales[strip] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            rule.apply(wide * scales[strip], weight, output[strip])
        ctx.save_for_backward(rows, scales, weight)
        ctx.rule = rule
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """dx = s (w dy - n mean(w dy n)), with s = 1 / sqrt(mean(x^2) + eps) and n = s x."""
        rows, scales, weight = ctx.saved_tensors
        dx, wide_weight = torch.empty_like(rows), weight.float() + ctx.rule.offset
        for strip in _strips(rows, 4):
            normed, pull = rows[strip] * scales[strip], upstream[strip] * wide_weight
            along = (pull * normed).mean(-1, keepdim=True)
            dx[strip] = pull.sub_(normed.mul_(along)).mul_(scales[strip])
        return dx, None, None, None


def _norm_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`(..., H)` -> `(..., H)`."""
    alike = len(args) == 1 and not kwargs and args[0].dtype == self.weight.dtype != torch.float64
    if not alike or self.weight.requires_grad or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    return _normalised(x, self.weight, _eps(self), self._lean_rule)


def _normalised(x: Tensor, weight: Tensor, eps: float, rule: NormRule) -> Tensor:
    return _Norm.apply(x.reshape(-1, x.shape[-1]), weight, eps, rule).view(x.shape)


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def norm_rule(module: nn.Module) -> NormRule | None:
    """The rule of a norm by the root mean square; None for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or module._modules or not _eps(module):
        return None
    found = set(NORM_RULES)
    for dtype in PROBE_DTYPES:
        x, small = _probe(24, dtype), _draw(24, dtype=dtype)
        own = _of_stand_in(module, x, weight=nn.Parameter(small, requires_grad=False))
        if own is None:
            return None
        found = {rule for rule in found if _same(own, _normalised(x, small, _eps(module), rule))}
    return next((rule for rule in NORM_RULES if rule in found), None)


# ---- gated MLPs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gated(Source):
    """The input of an MLP's last matrix: act(gate) * up, `(N, I)` each."""

    act: Callable[[Tensor], Tensor]

    def value(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        output = torch.empty_like(up)
        for strip in _strips(gate, gate.itemsize):
            torch.mul(self.act(gate[strip]), up[strip], out=output[strip])
        return output

    def pull(self, upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """d gate and d up, which takes the place of the upstream gradient."""
        d_gate = torch.empty_like(gate)
        for strip in _strips(gate, gate.itemsize):
            with torch.enable_grad():
                inner = gate[strip].detach().requires_grad_()
                active = self.act(inner)
            (d_gate[strip],) = torch.autograd.grad(active, inner, upstream[strip] * up[strip])
            upstream[strip] *= active.detach()
        return d_gate, upstream


def _gate_and_up(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return module.gate_proj(x), module.up_proj(x)


def _halves(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    return gate, up


_MLPS = {("gate_proj", "up_proj", "down_proj"): _gate_and_up, ("gate_up_proj", "down_proj"): _halves}
"""How gate and up come about, by the names of an MLP's linear layers."""


def _linears(module: nn.Module) -> tuple[str, ...]:
    return next((names for names in _MLPS if all(name in module._modules for name in names)), ())


def _activation(module: nn.Module) -> Any:
    return getattr(module, "act_fn", getattr(module, "activation_fn", None))


def _mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`(..., H)` -> `(..., H)`."""
    act, down = _activation(self), self.down_proj
    if len(args) != 1 or kwargs or not _is_quiet(act) or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    gate_and_up = _MLPS[_linears(self)]
    if not torch.is_grad_enabled():
        return down(_gated_product(act, *gate_and_up(self, *args)))
    if type(down) is FastLinear4bit and is_bare(down) and down.serves:
        gate, up = gate_and_up(self, *args)
        return down.of(_Gated(act), gate, up) if gate.dtype == up.dtype else down(act(gate) * up)
    return type(self).forward(self, *args, **kwargs)


def _is_quiet(act: Any) -> bool:
    """Whether an activation is a function alone: nothing acts on its calls, and nothing of it is trained."""
    return not isinstance(act, nn.Module) or (is_bare(act) and not any(p.requires_grad for p in act.parameters()))


def _gated_product(act: Any, gate: Tensor, up: Tensor) -> Tensor:
    """`(..., I)`, in a function of its own so that gate and up are gone when it is multiplied."""
    if gate.dtype != up.dtype:
        return act(gate) * up
    return _Gated(act).value(*(part.reshape(-1, part.shape[-1]) for part in (gate, up))).view(gate.shape)


@torch.no_grad()
def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is down(act(gate(x)) * up(x)) and nothing else."""
    names, act = _linears(module), _activation(module)
    if not names or act is None or set(module._modules) - {*names, "act_fn", "activation_fn"} or module._parameters:
        return False
    sizes = {"gate_proj": (12, 16), "up_proj": (12, 16), "gate_up_proj": (12, 32), "down_proj": (16, 12)}
    acts = {name: module._modules[name] for name in ("act_fn", "activation_fn") if name in module._modules}
    for dtype in PROBE_DTYPES:
        layers = {name: nn.Linear(*sizes[name], bias=False, device="meta", dtype=dtype) for name in names}
        for layer in layers.values():  # without PyTorch's own draws, which would move its generator
            layer.weight = nn.Parameter(_draw(*layer.weight.shape, dtype=dtype))
        x = _probe(12, dtype)
        own = _of_stand_in(module, x, **layers, **acts)
        if own is None:
            return False
        gate, up = _MLPS[names](types.SimpleNamespace(**layers), x)
        if not _same(own, layers["down_proj"](_Gated(act).value(gate, up))):
            return False
    return True


# ---- putting them in place -------------------------------------------------------------------------------------------


PROBE_DTYPES = torch.bfloat16, torch.float32


def _draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(dtype)


def _probe(width: int, dtype: torch.dtype) -> Tensor:
    """`(n, width)` with rows small enough for an eps to count, and large enough for a limit to cut."""
    sizes = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 1.0, 30.0, 1e3, 1e4], device="cpu")
    return (_draw(len(sizes), width, dtype=torch.float32) * sizes[:, None]).to(dtype)


def _same(own: Tensor, ours: Tensor) -> bool:
    return own.dtype == ours.dtype and torch.equal(own, ours)


def _of_stand_in(module: nn.Module, x: Tensor, **parts: Any) -> Tensor | None:
    """What a module's class makes of `x` with other weights and layers; None if it cannot."""
    stand_in = copy.copy(module)
    stand_in.__dict__ |= {
        "_parameters": {name: part for name, part in parts.items() if isinstance(part, nn.Parameter)},
        "_modules": {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
    }
    try:
        output = type(module).forward(stand_in, x)
    except Exception:  # whatever code it is, it is not what was looked for
        return None
    return output if isinstance(output, Tensor) else None


def use_lean_layers(model: nn.Module) -> int:
    """Let a model's norms and gated MLPs keep less for the backward pass. Idempotent; returns how many are changed.

    Modules whose forward another library replaced are left alone.
    """
    count = 0
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        if is_gated_mlp(module):
            forward = _mlp_forward
        elif (rule := norm_rule(module)) is not None:
            module._lean_rule = rule  # type: ignore[assignment]
            forward = _norm_forward
        else:
            continue
        module.forward = functools.partial(forward, module)  # which pickles and copies, unlike a method
        count += 1
    return count
