"""Which reference the policy is compared with: one call, from a batch to the log-probabilities of its completions.

The reference pass runs before the policy's, so its activations never sit on top of the policy's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from qlora_dpo.adapters import (
    adapter_weights,
    adapters_active,
    adapters_disabled,
    base_weights,
    changes_base,
    frozen_adapters,
    is_fresh,
    loading_changes_base,
    lora_linears,
    require_token_adapters,
    trainable_copy,
    trained_adapters,
    weights_replaced,
)
from qlora_dpo.averaging import Factors, averaged, recompressed
from qlora_dpo.cache import weights_fingerprint
from qlora_dpo.forward import install_scoring, noise_off, score_batch
from qlora_dpo.model import check_path, is_quantized, keep_one_arithmetic, load_base

REFERENCES = ("auto", "base", "initial", "none")
"""What the option `reference` names; anything else is a path or id."""
ADAPTER_NAME = "reference"
"""Name of a reference adapter that is loaded beside the policy's."""


class Reference(Protocol):
    """Scores completions under the reference."""

    kind: str
    """`base`, `initial`, `adapter`, `model`, `average`, `given` or `none`, as `qlora_dpo.json` has it."""
    description: str
    """What it is, for people."""
    source: str | None
    """Path or id it can be loaded from again, if it has one."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps` `(B,)` in nats and, unless they are given as sums, `token_logps` `(N,)`, without gradient."""

    def weights(self) -> dict[str, Tensor]:
        """The tensors that decide its scores, by name."""


class _LiveReference:
    """A reference that is scored by the policy's own modules with other weights in force."""

    kind = "base"
    description = ""
    source: str | None = None

    def __init__(self, policy: PeftModel, chunk_size: int | None = None) -> None:
        self.policy, self.chunk_size = policy, chunk_size

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The policy's modules as the reference."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities in nats, without gradient."""
        with torch.no_grad(), self.in_force(), noise_off(self.policy):
            return score_batch(model, batch, chunk_size=self.chunk_size)

    def weights(self) -> dict[str, Tensor]:
        """The tensors that decide its scores, by name."""
        return base_weights(self.policy)


class BaseReference(_LiveReference):
    """The base model: the policy with its adapters disabled."""

    kind = "base"
    description = "the base model (adapters disabled)"

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """No adapter."""
        return adapters_disabled(self.policy)


class AdapterReference(_LiveReference):
    """The base with frozen adapters: those the policy is stacked on, or one that was loaded to compare with."""

    kind = "adapter"

    def __init__(
        self, policy: PeftModel, names: list[str], chunk_size: int | None = None, source: str | None = None
    ) -> None:
        super().__init__(policy, chunk_size)
        self.names, self.source = names, source
        self.description = f"the base with the frozen adapter {source or ', '.join(names)}"

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """Only the frozen adapters."""
        return adapters_active(self.policy, self.names)

    def weights(self) -> dict[str, Tensor]:
        """The base's and the adapters' tensors, their scaling included."""
        return {**base_weights(self.policy), **_adapter_identity(self.policy, self.names)}


class InitialReference(_LiveReference):
    """The policy's own start: a copy of every weight that is trained, put in place for the pass.

    Right by construction for whatever is trained: a continued adapter, biases, whole modules, DoRA, and initialisations
    that change the base. The copy never leaves memory; a resumed run makes it again from the same start.
    """

    kind = "initial"
    description = "the policy as it was at the start (frozen copy)"

    def __init__(self, policy: PeftModel, chunk_size: int | None = None, source: str | None = None) -> None:
        super().__init__(policy, chunk_size)
        self.start, self.source = trainable_copy(policy), source
        self._adds_nothing = is_fresh(policy)

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The weights of the start."""
        self.start = [(parameter, value.to(parameter.device)) for parameter, value in self.start]
        return weights_replaced(self.start)

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the start."""
        copies = {id(parameter): value for parameter, value in self.start}
        adapters = _adapter_identity(self.policy, list(self.policy.active_adapters))
        if self._adds_nothing:  # random A matrices that decide nothing
            adapters = {name: t for name, t in adapters.items() if self.policy.base_model.prefix not in name}
        named = {**base_weights(self.policy), **adapters}
        return {name: copies.get(id(tensor), tensor) for name, tensor in named.items()}


class AverageReference(_LiveReference):
    """TR-DPO: the reference's weight change follows the policy's by exponential average.

    Until the first `update` it is what it starts from, to the last bit.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656.
    """

    kind = "average"
    description = "a moving average of the policy (TR-DPO)"

    def __init__(
        self, policy: PeftModel, alpha: float, max_rank: int, chunk_size: int | None = None, from_base: bool = True
    ) -> None:
        super().__init__(policy, chunk_size)
        (self.name,) = trained_adapters(policy)
        self.layers = lora_linears(policy, self.name)
        self.alpha, self.max_rank, self.from_base = alpha, max_rank, from_base
        self._change = {path: None if from_base else self._of_policy(path) for path in self.layers}
        self._start = trainable_copy(policy)
        if from_base:
            b = [layer.lora_B[self.name].weight for layer in self.layers.values()]
            self._start = [(weight, torch.zeros_like(weight)) for weight in b]
        self.updates = 0

    def _of_policy(self, path: str) -> Factors:
        """The policy's change of a layer, its scaling in B."""
        layer = self.layers[path]
        b = layer.lora_B[self.name].weight.detach() * layer.scaling[self.name]
        return layer.lora_A[self.name].weight.detach().clone(), b

    def update(self) -> float:
        """Move towards the policy; returns the largest relative error of a recompression."""
        worst = 0.0
        for path, change in self._change.items():
            device = self.layers[path].lora_A[self.name].weight.device  # which may be another than at the start
            before = None if change is None else (change[0].to(device), change[1].to(device))
            self._change[path], error = recompressed(averaged(before, self._of_policy(path), self.alpha), self.max_rank)
            worst = max(worst, error)
        self.updates += 1
        return worst

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The averaged change in place of the adapter's."""
        return self._average() if self.updates else weights_replaced(self._start)

    @contextlib.contextmanager
    def _average(self) -> Iterator[None]:
        """The averaged factors as the adapter's, with a scaling of 1."""
        replaced: list[tuple[nn.Parameter, Tensor]] = []
        scaling = {path: layer.scaling[self.name] for path, layer in self.layers.items()}
        for path, factors in self._change.items():
            assert factors is not None
            layer = self.layers[path]
            replaced += [(layer.lora_A[self.name].weight, factors[0]), (layer.lora_B[self.name].weight, factors[1])]
        try:
            for layer in self.layers.values():
                layer.scaling[self.name] = 1.0
            with weights_replaced(replaced):
                yield
        finally:
            for path, layer in self.layers.items():
                layer.scaling[self.name] = scaling[path]

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged factors, for a checkpoint; empty before the first update."""
        if not self.updates:
            return {}
        named = ((path, factors) for path, factors in self._change.items() if factors is not None)
        return {f"{path}.{side}": t.cpu().contiguous() for path, ab in named for side, t in zip("AB", ab, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's factors."""
        for path, layer in self.layers.items():
            device = layer.lora_A[self.name].weight.device
            self._change[path] = (state[f"{path}.A"].to(device), state[f"{path}.B"].to(device))
        self.updates += 1


class ModelReference:
    """A model of its own, frozen."""

    kind = "model"

    def __init__(self, model: Any, chunk_size: int | None = None, source: str | None = None) -> None:
        self.model, self.chunk_size, self.source = model, chunk_size, source
        self.description = f"a separate model ({source or type(model).__name__})"
        keep_one_arithmetic(model)
        model.requires_grad_(False)
        model.eval()
        install_scoring(model.get_base_model() if isinstance(model, PeftModel) else model)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities under the reference's own model, in nats."""
        with torch.no_grad(), noise_off(self.model):
            return score_batch(self.model, batch, chunk_size=self.chunk_size)

    def placed_on(self, device: torch.device) -> Any:
        """The model, on a device if it was not placed when it was loaded."""
        if getattr(self.model, "hf_device_map", None) is None and not is_quantized(self.model):
            self.model.to(device)
        return self.model

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the model."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


class NoReference:
    """No reference: log-probabilities of zero, so rewards are beta log pi."""

    kind = "none"
    description = "none"
    source: str | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros, in fp32."""
        zeros = torch.zeros(sum(batch["lengths"]), device=batch["yw_idxs"].device)
        return {"logps": zeros[: len(batch["lengths"])], "token_logps": zeros}

    def weights(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class GivenReference:
    """Log-probabilities that the data set brings, and another reference for sets without them."""

    kind = "given"
    description = "given log-probabilities (column `ref_logps`)"
    source: str | None = None

    def __init__(self, otherwise: Reference) -> None:
        self.otherwise = otherwise

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The given sums, in nats."""
        if "ref_logps" not in batch:
            return self.otherwise(model, batch)
        return {"logps": torch.tensor(batch["ref_logps"], dtype=torch.float64).float().to(batch["yw_idxs"].device)}

    def weights(self) -> dict[str, Tensor]:
        """Those of the reference for other sets."""
        return self.otherwise.weights()


def _adapter_identity(policy: PeftModel, names: list[str]) -> dict[str, Tensor]:
    """Tensors of adapters and their scalings, whatever the adapters are called."""

    def anonymous(path: str) -> str:
        return ".".join(f"adapter{names.index(part)}" if part in names else part for part in path.split("."))

    scalings = {
        f"{path}.scaling.{name}": torch.tensor(module.scaling[name])
        for path, module in policy.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for name in names
        if name in module.scaling
    }
    return {anonymous(path): tensor for path, tensor in {**adapter_weights(policy, names), **scalings}.items()}


def fingerprint(reference: Reference) -> str:
    """A hash of the tensors that decide a reference's scores: equal for equal weights, whatever their history."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reference.weights().items():
            yield name, tensor
            state = getattr(tensor, "quant_state", None)
            if state is not None:  # constants of a 4-bit weight
                yield from ((f"{name}.{key}", value) for key, value in state.as_dict(packed=True).items())

    return weights_fingerprint(tensors())


def with_given(reference: Reference, asked: str) -> GivenReference:
    """The data set's own log-probabilities in place of a reference, which stays for sets without them.

    Args:
        reference: What would be the reference.
        asked: The option `reference`.

    Raises:
        ValueError: If another reference was asked for.
    """
    if asked != "auto" or reference.kind in ("model", "average", "none"):
        raise ValueError(
            f"`reference` must be 'auto' with a column `ref_logps`, which takes its place, got "
            f"'{reference.description}'. Drop one of them."
        )
    return GivenReference(reference)


def starts_at(reference: Reference, policy: PeftModel) -> bool:
    """Whether the policy, as it is now, should equal the reference."""
    if isinstance(reference, InitialReference):
        return True
    fresh = is_fresh(policy, trained_adapters(policy))
    if isinstance(reference, AdapterReference):
        return fresh and reference.names == frozen_adapters(policy)
    if isinstance(reference, AverageReference):
        return fresh or not reference.from_base
    return isinstance(reference, BaseReference) and fresh and not frozen_adapters(policy)


def adapter_fingerprint(reference: Reference) -> str | None:
    """The same of the adapter's part alone: quick, and what `qlora_dpo.json` records; None without one."""
    live = getattr(reference, "live", reference)  # behind a cache
    if not isinstance(live, (AdapterReference, InitialReference)):
        return None
    base = base_weights(live.policy)
    inside = {name: tensor for name, tensor in live.weights().items() if name not in base}
    return weights_fingerprint(inside.items())


def make_reference(
    kind: str,
    policy: PeftModel,
    chunk_size: int | None = None,
    *,
    ref_model: Any = None,
    ignored: bool = False,
    in_4bit: bool = True,
    average: tuple[float, int] | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> Reference:
    """The reference that the options name.

    Args:
        kind: `auto`, `base`, `initial`, `none`, or the path or id of an adapter or of a model.
        policy: The model to train, at its start.
        chunk_size: Positions in a tile of logits.
        ref_model: A model of its own, as in TRL.
        ignored: Whether no loss looks at the reference, so that `auto` needs none.
        in_4bit: Whether to load a model named by `kind` in 4 bit.
        average: Share of the policy in each update and largest rank, for a moving average.
        model_kwargs: Passed to `from_pretrained` for a model named by `kind`.

    Raises:
        ValueError: If the base is asked for where training changes it.
        NotImplementedError: For adapters that the layouts cannot carry.
    """
    require_token_adapters(policy)
    if ref_model is not None:
        return ModelReference(ref_model, chunk_size, getattr(ref_model.config, "_name_or_path", None) or None)
    if kind == "auto":
        kind = _automatic(policy, ignored)
    if kind == "none":
        if average is not None:
            raise ValueError(
                "`sync_ref_model` must be False without a reference, which these losses do not use, got True. Drop it."
            )
        return NoReference()
    if kind == "base":
        reason = changes_base(policy)
        if reason is not None:
            raise ValueError(
                f"reference='base' must have a base that stays as it is, got one that does not: {reason}. "
                "Use reference='initial', which keeps a copy of the start."
            )
    if average is not None:
        return AverageReference(policy, *average, chunk_size, from_base=kind == "base")
    if kind == "base":
        return BaseReference(policy, chunk_size)
    if kind == "adapter":
        return AdapterReference(policy, frozen_adapters(policy), chunk_size, _source(policy, frozen_adapters(policy)))
    if kind == "initial":
        return InitialReference(policy, chunk_size, _source(policy, trained_adapters(policy)))
    return _loaded(kind, policy, chunk_size, in_4bit, model_kwargs or {})


def _automatic(policy: PeftModel, ignored: bool) -> str:
    """What `reference='auto'` picks: the policy's own start, in its cheapest form."""
    if ignored:
        return "none"
    if not is_fresh(policy, trained_adapters(policy)) or changes_base(policy) is not None:
        return "initial"
    return "adapter" if frozen_adapters(policy) else "base"


def _source(policy: PeftModel, names: list[str]) -> str | None:
    """Where the one named adapter was loaded from, if `load_policy` loaded it."""
    sources = getattr(policy, "adapter_sources", {})
    return sources.get(names[0]) if len(names) == 1 else None


def _loaded(
    path_or_id: str, policy: PeftModel, chunk_size: int | None, in_4bit: bool, model_kwargs: dict[str, Any]
) -> Reference:
    """An adapter or a model by its path or id."""
    path = check_path(path_or_id, "reference")
    if find_adapter_config_file(path) is None:
        model = load_base(path, quantize=in_4bit, **model_kwargs)
        return ModelReference(model, chunk_size, path_or_id)
    config = PeftConfig.from_pretrained(path)
    if loading_changes_base(config):
        raise ValueError(
            f"The reference adapter must leave the base as it is, got {path_or_id} with init_lora_weights="
            f"{config.init_lora_weights!r}. Convert it to plain LoRA (PEFT's path_initial_model_for_weight_conversion)."
        )
    if config.peft_type != policy.peft_config[policy.active_adapters[0]].peft_type:
        raise ValueError(
            f"The reference adapter must be of the policy's kind, got {config.peft_type.value}. Merge it into its base "
            "and name that model instead."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    policy.load_adapter(path, ADAPTER_NAME, is_trainable=False)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return AdapterReference(policy, [ADAPTER_NAME], chunk_size, str(Path(path_or_id)) if Path(path).exists() else path)
