"""A LoRA layer over a 4-bit linear layer, as one autograd function.

The same numbers as PEFT's own forward, with fewer passes over the activations: the low-rank product is added to the
base's output in place, its scale folded into the product, and the backward pass keeps the input and its projections of
rank r only. Layers stay PEFT's: only their class changes, to one that adds no state.

Legend: N positions, i input and o output features, r rank.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as BaseLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_dpo.bare import is_bare


class Source:
    """What the input of a layer is made of, and kept as: here the input itself."""

    def value(self, *parts: Tensor) -> Tensor:
        """The input `(N, i)`."""
        return parts[0]

    def pull(self, upstream: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each part, from that of the input, which may be overwritten."""
        return (upstream,)


class _LoraOver4Bit(torch.autograd.Function):
    """y = W x + sum over adapters of s B A x, with the frozen W in 4 bit."""

    @staticmethod
    def forward(ctx: Any, source: Source, base: nn.Module, scales: list[float], *tensors: Tensor) -> Tensor:
        """The base's output first, by its own code, so that a pass without adapters computes the same bits.

        Args:
            ctx: Of autograd.
            source: What x is made of.
            base: The 4-bit layer.
            scales: Factor of each adapter.
            *tensors: The parts of x; then `A` `(r, i)` and `B` `(o, r)` of each adapter, in the dtype they compute in.
        """
        parts, factors = tensors[: -2 * len(scales)], tensors[-2 * len(scales) :]
        x = source.value(*parts)
        output = base(x)
        projections = []
        for scale, a, b in zip(scales, factors[::2], factors[1::2], strict=True):
            projection = x.to(a.dtype) @ a.t()
            if output.dtype == b.dtype:
                output.addmm_(projection, b.t(), alpha=scale)
            else:
                output += (projection @ b.t() * scale).to(output.dtype)
            projections.append(projection)
        ctx.source, ctx.base, ctx.scales = source, base, scales
        ctx.save_for_backward(*parts, *projections, *factors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parts of x, of A and of B; W is dequantised once, and only if that of x is wanted."""
        saved, count = ctx.saved_tensors, len(ctx.scales)  # read once: a checkpoint hands them out once
        parts, projections, factors = saved[: -3 * count], saved[-3 * count : -2 * count], saved[-2 * count :]
        wanted = ctx.needs_input_grad[3:]
        of_parts, of_factors = wanted[: len(parts)], wanted[len(parts) :]
        x = ctx.source.value(*parts) if any(of_factors[::2]) else parts[0]
        pulls, grads = [], []
        for i, (scale, projection) in enumerate(zip(ctx.scales, projections, strict=True)):
            above = upstream.to(projection.dtype)
            pulls.append(above @ factors[2 * i + 1])
            wants_a, wants_b = of_factors[2 * i : 2 * i + 2]
            grads.append(_product(pulls[i].t(), x.to(projection.dtype), scale) if wants_a else None)
            grads.append(_product(above.t(), projection, scale) if wants_b else None)
        del x
        if not any(of_parts):
            return None, None, None, *(None for _ in parts), *grads
        dtype = ctx.base.compute_dtype or parts[0].dtype
        weight = dequantize_4bit(ctx.base.weight.view(-1, 1), ctx.base.weight.quant_state).to(dtype)
        dx = (upstream.to(dtype) @ weight).to(parts[0].dtype)
        del weight
        for scale, pull, a in zip(ctx.scales, pulls, factors[::2], strict=True):
            if dx.dtype == a.dtype:
                dx.addmm_(pull, a, alpha=scale)
            else:
                dx += (pull @ a * scale).to(dx.dtype)
        return None, None, None, *ctx.source.pull(dx, *parts), *grads


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """A matrix product times a number that is multiplied before the result is rounded."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class FastLinear4bit(Linear4bit):
    """PEFT's layer with a faster forward pass, and PEFT's own wherever that one cannot serve."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., i)` -> `(..., o)`."""
        return super().forward(x, *args, **kwargs) if args or kwargs or not self.serves else self.of(Source(), x)

    def of(self, source: Source, *parts: Tensor) -> Tensor:
        """The output `(..., o)` for an input that is made of `parts`, `(..., i)` each; if the layer `serves`."""
        names = self._adapters
        weights = [layers[name].weight for name in names for layers in (self.lora_A, self.lora_B)]
        device, shape = parts[0].device.type, parts[0].shape[:-1]
        if torch.is_autocast_enabled(device):
            weights = [weight.to(torch.get_autocast_dtype(device)) for weight in weights]
        scales = [float(self.scaling[name]) for name in names]
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        return _LoraOver4Bit.apply(source, self.base_layer, scales, *rows, *weights).unflatten(0, shape)

    @property
    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    @property
    def serves(self) -> bool:
        """Whether the layer is plain LoRA without dropout over a frozen 4-bit layer."""
        base, names = self.base_layer, self._adapters
        state = getattr(base.weight, "quant_state", None)
        return (
            bool(names)
            and not self.disable_adapters
            and not self.merged
            and is_bare(base)
            and not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
            and state is not None
            and tuple(state.shape) == (base.out_features, base.in_features)
            and not getattr(state, "packing_format_for_cpu", False)
            and all(self._is_plain(name) for name in names)
        )

    def _is_plain(self, name: str) -> bool:
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        quiet = isinstance(dropout, nn.Identity) or not dropout.training or getattr(dropout, "p", 1.0) == 0.0
        plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
        return quiet and plain and name not in self.lora_variant and is_bare(a) and is_bare(b) and a.weight.dim() == 2


class TrainedBiasLinear4bit(BaseLinear4bit):
    """bitsandbytes' layer with a bias that stays in the dtype it is trained in; its own would round it for good."""

    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """`(..., i)` -> `(..., o)`."""
        bias, self.bias = self.bias, None
        try:
            return super().forward(x) + bias.to(x.dtype)
        finally:
            self.bias = bias


def keep_trained_biases(model: nn.Module) -> None:
    """Let 4-bit layers leave a bias that is trained in its dtype."""
    for module in model.modules():
        if type(module) is BaseLinear4bit and module.bias is not None and module.bias.requires_grad:
            module.__class__ = TrainedBiasLinear4bit


def use_fast_lora(model: nn.Module) -> int:
    """Let PEFT's LoRA layers over 4-bit layers take the faster forward pass. Idempotent; returns their number."""
    found = [module for module in model.modules() if type(module) in (Linear4bit, FastLinear4bit)]
    for module in found:
        module.__class__ = FastLinear4bit
    return len(found)
