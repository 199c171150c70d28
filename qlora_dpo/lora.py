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


class _LoraOver4Bit(torch.autograd.Function):
    """y = W x + sum over adapters of s B A x, with the frozen W in 4 bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, scales: list[float], *factors: Tensor) -> Tensor:
        """The base's output first, by its own code, so that a pass without adapters computes the same bits.

        Args:
            ctx: Of autograd.
            x: `(N, i)`.
            base: The 4-bit layer.
            scales: Factor of each adapter.
            *factors: `A` `(r, i)` and `B` `(o, r)` of each adapter, in the dtype they compute in.
        """
        output = base(x)
        projections = []
        for scale, a, b in zip(scales, factors[::2], factors[1::2], strict=True):
            projection = x.to(a.dtype) @ a.t()
            if output.dtype == b.dtype:
                output.addmm_(projection, b.t(), alpha=scale)
            else:
                output += (projection @ b.t() * scale).to(output.dtype)
            projections.append(projection)
        ctx.base, ctx.scales = base, scales
        ctx.save_for_backward(x, *projections, *factors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dA and dB; W is dequantised once, and only if dx is wanted."""
        count = len(ctx.scales)
        x, *saved = ctx.saved_tensors  # read once: a checkpoint hands them out once
        projections, factors = saved[:count], saved[count:]
        needed = ctx.needs_input_grad
        dx: Tensor | None = None
        if needed[0]:
            dtype = ctx.base.compute_dtype or x.dtype
            weight = dequantize_4bit(ctx.base.weight.view(-1, 1), ctx.base.weight.quant_state).to(dtype)
            dx = (upstream.to(dtype) @ weight).to(x.dtype)
            del weight
        grads: list[Tensor | None] = []
        for i, (scale, projection) in enumerate(zip(ctx.scales, projections, strict=True)):
            a, b = factors[2 * i : 2 * i + 2]
            above = upstream.to(b.dtype)
            through = above @ b
            if dx is not None and dx.dtype == a.dtype:
                dx.addmm_(through, a, alpha=scale)
            elif dx is not None:
                dx += (through @ a * scale).to(dx.dtype)
            grads.append(_product(through.t(), x.to(a.dtype), scale) if needed[3 + 2 * i] else None)
            grads.append(_product(above.t(), projection, scale) if needed[4 + 2 * i] else None)
        return dx, None, None, *grads


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """A matrix product times a number that is multiplied before the result is rounded."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class FastLinear4bit(Linear4bit):
    """PEFT's layer with a faster forward pass, and PEFT's own wherever that one cannot serve."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(..., i)` -> `(..., o)`."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not names or not self._serves(names):
            return super().forward(x, *args, **kwargs)
        weights = [layers[name].weight for name in names for layers in (self.lora_A, self.lora_B)]
        if torch.is_autocast_enabled(x.device.type):
            weights = [weight.to(torch.get_autocast_dtype(x.device.type)) for weight in weights]
        scales = [float(self.scaling[name]) for name in names]
        return _LoraOver4Bit.apply(x.reshape(-1, x.shape[-1]), self.base_layer, scales, *weights).unflatten(
            0, x.shape[:-1]
        )

    def _serves(self, names: list[str]) -> bool:
        """Whether the layer is plain LoRA without dropout over a frozen 4-bit layer."""
        base = self.base_layer
        state = getattr(base.weight, "quant_state", None)
        return (
            not self.disable_adapters
            and not self.merged
            and _is_bare(base)
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
        return quiet and plain and name not in self.lora_variant and _is_bare(a) and _is_bare(b) and a.weight.dim() == 2


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing acts on a call of the module: no hook, no weights that are brought when it is called."""
    return not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


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
