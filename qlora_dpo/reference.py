"""Which reference the policy is compared with: one call, from a batch to the log-probabilities of its completions.

The reference pass runs before the policy's, so its activations never sit on top of the policy's.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_dpo.adapters import (
    adapter_weights,
    adapters_active,
    adapters_disabled,
    base_weights,
    changes_base,
    frozen_adapters,
    is_fresh,
    lora_linears,
    require_token_adapter,
    require_usable,
    trainable_copy,
    trained_adapters,
    weights_replaced,
)
from qlora_dpo.averaging import Factors, averaged, recompressed
from qlora_dpo.cache import weights_fingerprint
from qlora_dpo.config import REFERENCES
from qlora_dpo.forward import install_scoring, noise_off, score_batch
from qlora_dpo.model import adapters_below, add_saved_adapter, is_quantized, keep_one_arithmetic, load_base
from qlora_dpo.paths import adapter_folder, check_path, naming

GIVEN = "given log-probabilities (column `ref_logps`)"
ADAPTER_NAME = "reference"
"""Name of a reference adapter that is loaded beside the policy's."""


class Reference(Protocol):
    """Scores completions under the reference."""

    kind: str
    """`base`, `initial`, `adapter`, `model`, `average` or `none`, as `qlora_dpo.json` has it."""
    description: str
    """What it is, for people."""
    source: str | None
    """Path or id it can be loaded from again, if it has one."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps` `(B,)` in nats and `token_logps` `(N,)`, without gradient."""

    def weights(self) -> dict[str, Tensor]:
        """The tensors that decide its scores, by name."""


class LiveReference:
    """A reference that is scored by the policy's own modules with other weights in force."""

    kind = "base"
    description = ""
    source: str | None = None

    def __init__(self, policy: PeftModel, chunk_size: int | None = None) -> None:
        self.policy, self.chunk_size = policy, chunk_size

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The policy's modules as the reference."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: dict[str, Any], statistics: Sequence[str] = ()) -> dict[str, Tensor]:
        """Log-probabilities in nats, and the statistics asked for, without gradient."""
        with torch.no_grad(), self.in_force(), noise_off(self.policy):
            return score_batch(model, batch, statistics, self.chunk_size)

    def weights(self) -> dict[str, Tensor]:
        """The tensors that decide its scores, by name."""
        return _base_identity(self.policy)


class BaseReference(LiveReference):
    """The base model: the policy with its adapters disabled."""

    kind = "base"
    description = "the base model (adapters disabled)"

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """No adapter."""
        return adapters_disabled(self.policy)


class AdapterReference(LiveReference):
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
        return {**_base_identity(self.policy), **_adapter_identity(self.policy, self.names)}


class InitialReference(LiveReference):
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
            prefix = self.policy.base_model.prefix
            adapters = {name: t for name, t in adapters.items() if prefix not in name and ".scaling." not in name}
        named = {**_base_identity(self.policy), **adapters}
        return {name: copies.get(id(tensor), tensor) for name, tensor in named.items()}


class AverageReference(LiveReference):
    """TR-DPO: the reference's weight change follows the policy's by exponential average.

    Until the first `update` it is what it starts from, to the last bit.

    Attributes:
        error: Largest relative error of a recompression in the last update.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656.
    """

    kind = "average"
    description = "a moving average of the policy (TR-DPO)"

    def __init__(
        self, policy: PeftModel, alpha: float, max_rank: int, chunk_size: int | None = None, from_base: bool = True
    ) -> None:
        super().__init__(policy, chunk_size)
        names = trained_adapters(policy)
        if len(names) > 1:
            raise NotImplementedError(
                f"`sync_ref_model` must have one trained adapter, got {names}. Freeze the others."
            )
        self.name = names[0]
        self.layers = lora_linears(policy, self.name)
        self.alpha, self.max_rank, self.from_base = alpha, max_rank, from_base
        self._first = {path: None if from_base else self._of_policy(path) for path in self.layers}
        self._change = dict(self._first)
        self._start = trainable_copy(policy)
        if from_base:
            b = [layer.lora_B[self.name].weight for layer in self.layers.values()]
            self._start = [(weight, torch.zeros_like(weight)) for weight in b]
        self.updates, self.error = 0, 0.0
        active = list(policy.active_adapters)
        self.hash = None if from_base else weights_fingerprint(_adapter_identity(policy, active).items())

    def _of_policy(self, path: str) -> Factors:
        """The policy's change of a layer, its scaling in B."""
        layer = self.layers[path]
        b = layer.lora_B[self.name].weight.detach() * layer.scaling[self.name]
        return layer.lora_A[self.name].weight.detach().clone(), b

    def update(self) -> float:
        """Move towards the policy; returns `error`."""
        self.error = 0.0
        for path, change in self._change.items():
            device = self.layers[path].lora_A[self.name].weight.device  # which may be another than at the start
            before = None if change is None else (change[0].to(device), change[1].to(device))
            self._change[path], error = recompressed(averaged(before, self._of_policy(path), self.alpha), self.max_rank)
            self.error = max(self.error, error)
        self.updates += 1
        return self.error

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """The averaged change in place of the adapter's."""
        return self._average() if self.updates else self._at_start()

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        with self._own_adapters(), weights_replaced(self._start):
            yield

    def _own_adapters(self) -> contextlib.AbstractContextManager[None]:
        """What is averaged over the base alone, if it started there, and over frozen adapters otherwise."""
        return adapters_active(self.policy, [self.name] if self.from_base else list(self.policy.active_adapters))

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
            with self._own_adapters(), weights_replaced(replaced):
                yield
        finally:
            for path, layer in self.layers.items():
                layer.scaling[self.name] = scaling[path]

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged factors, for a checkpoint; empty before the first update."""
        if not self.updates:
            return {}
        named = ((path, factors) for path, factors in self._change.items() if factors is not None)
        state = {f"{path}.{side}": t.cpu().contiguous() for path, ab in named for side, t in zip("AB", ab, strict=True)}
        return state | {"error": torch.tensor(self.error, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's factors; without any, from the start."""
        if not state:
            self.updates, self.error = 0, 0.0
            self._change = dict(self._first)
            return
        for path, layer in self.layers.items():
            device = layer.lora_A[self.name].weight.device
            self._change[path] = (state[f"{path}.A"].to(device), state[f"{path}.B"].to(device))
        self.updates += 1
        self.error = float(state.get("error", 0.0))


class ModelReference:
    """A model of its own, frozen."""

    kind = "model"

    def __init__(self, model: Any, chunk_size: int | None = None, source: str | None = None) -> None:
        self.model, self.chunk_size, self.source = model, chunk_size, source
        self.description = f"a separate model ({source or type(model).__name__})"
        self.hash: str | None = None
        if isinstance(model, PeftModel):
            for name in model.active_adapters:
                require_token_adapter(model.peft_config[name])
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
        """All tensors of the model, and those of the adapters that are in force."""
        if isinstance(self.model, PeftModel):
            return {**_base_identity(self.model), **_adapter_identity(self.model, list(self.model.active_adapters))}
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), **_constants(self.model)}


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


def _base_identity(policy: PeftModel) -> dict[str, Tensor]:
    """Tensors of the base model and the scales of its 8-bit layers."""
    return {**base_weights(policy), **_constants(policy.get_base_model())}


def _adapter_identity(policy: PeftModel, names: list[str]) -> dict[str, Tensor]:
    """Tensors of adapters and their scalings, whatever the adapters are called."""

    def anonymous(path: str) -> str:
        return ".".join(f"adapter{names.index(part)}" if part in names else part for part in path.split("."))

    found: dict[str, Tensor] = dict(adapter_weights(policy, names))
    for path, module in policy.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            found |= {f"{path}.scaling.{name}": torch.tensor(scaling[name]) for name in names if name in scaling}
        if hasattr(module, "is_feedforward"):  # which side an IA3 vector scales
            found[f"{path}.is_feedforward"] = torch.tensor(module.is_feedforward)
    return {anonymous(path): tensor for path, tensor in found.items()}


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """The scales of 8-bit layers, which are neither parameters nor buffers."""
    states = {path: getattr(module, "state", None) for path, module in model.named_modules()}
    scales = {path: getattr(state, "SCB", None) for path, state in states.items()}
    for path, module in model.named_modules():
        if scales[path] is None:  # before the first forward they are at the weight
            scales[path] = getattr(getattr(module, "weight", None), "SCB", None)
    return {f"{path.replace('.base_layer', '')}.SCB": s for path, s in scales.items() if isinstance(s, Tensor)}


def fingerprint(reference: Reference) -> str:
    """A hash of the tensors that decide a reference's scores: equal for equal weights, whatever their history."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reference.weights().items():
            yield name, tensor
            state = getattr(tensor, "quant_state", None)
            if state is not None:  # constants of a 4-bit weight
                yield from ((f"{name}.{key}", value) for key, value in state.as_dict(packed=True).items())

    return weights_fingerprint(tensors())


def require_no_other(reference: Reference, asked: str) -> None:
    """Refuse another reference beside a data set's own log-probabilities (column `ref_logps`).

    Args:
        reference: What would be the reference.
        asked: The option `reference`.

    Raises:
        ValueError: If another was asked for.
    """
    if asked != "auto" or reference.kind in ("model", "average"):
        raise ValueError(
            f"`reference` must be 'auto' with a column `ref_logps`, which takes its place, got "
            f"'{reference.description}'. Drop one of them."
        )


def warn_of_itself(reference: Reference) -> None:
    """Say that a policy which is not trained here is compared with itself."""
    if isinstance(reference, InitialReference):
        warnings.warn(
            "The policy is compared with itself, so every reward is 0. Name the reference it was trained against: "
            "reference='base', or the path of an adapter or a model.",
            stacklevel=3,
        )


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


def reference_hash(reference: Reference) -> str | None:
    """A hash of what a reference has besides the policy's base: its adapter or its own model; None without either.

    Of an average it is that of its start.
    """
    live = getattr(reference, "live", reference)  # behind a cache
    if isinstance(live, ModelReference):
        live.hash = live.hash or fingerprint(live)
        return live.hash
    if isinstance(live, AverageReference):
        return live.hash
    if not isinstance(live, (AdapterReference, InitialReference)):
        return None
    base = _base_identity(live.policy)
    return weights_fingerprint((name, tensor) for name, tensor in live.weights().items() if name not in base)


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
    require_usable(policy)
    if ref_model is not None:
        return ModelReference(ref_model, chunk_size, getattr(ref_model.config, "_name_or_path", None) or None)
    kind = _automatic(policy, ignored) if kind == "auto" else kind
    if kind == "none" and average is not None:
        raise ValueError("`sync_ref_model` must be False for losses without a reference, got True. Set it to False.")
    if kind == "base":
        _require_constant_base(policy)
    if average is not None:
        return AverageReference(policy, *average, chunk_size, from_base=kind == "base")
    frozen, trained = frozen_adapters(policy), trained_adapters(policy)
    named: dict[str, Callable[[], Reference]] = {
        "none": NoReference,
        "base": lambda: BaseReference(policy, chunk_size),
        "adapter": lambda: AdapterReference(policy, frozen, chunk_size, _source(policy, frozen)),
        "initial": lambda: InitialReference(policy, chunk_size, _source(policy, trained)),
    }
    return named[kind]() if kind in named else _loaded(kind, policy, chunk_size, in_4bit, model_kwargs or {})


def _require_constant_base(policy: PeftModel) -> None:
    """Refuse the base as reference where it is not what it was, or will not stay it."""
    reason = changes_base(policy)
    if reason is not None:
        raise ValueError(
            f"reference='base' must have a base that stays as it is, got one that does not: {reason}. Use "
            "reference='initial', which keeps a copy of the start."
        )


def _automatic(policy: PeftModel, ignored: bool) -> str:
    """What `reference='auto'` picks: the policy's own start, in its cheapest form."""
    if ignored:
        return "none"
    if not is_fresh(policy, trained_adapters(policy)) or changes_base(policy) is not None:
        return "initial"
    return "adapter" if frozen_adapters(policy) else "base"


def _source(policy: PeftModel, names: list[str]) -> str | None:
    """Where the uppermost of some adapters was loaded from, if `load_policy` loaded it; its record names the others."""
    return getattr(policy, "adapter_sources", {}).get(names[-1])


def _loaded(
    path_or_id: str, policy: PeftModel, chunk_size: int | None, in_4bit: bool, model_kwargs: dict[str, Any]
) -> Reference:
    """An adapter, on what it was stacked on, or a model by its path or id."""
    source = check_path(path_or_id, "reference")
    close = get_close_matches(path_or_id, REFERENCES, n=1)
    hint = f"Did you mean {close[0]}?" if close else "Check the path, or the id, and for a private one the login."
    with naming(
        f"`reference` must be one of {list(REFERENCES)}, or the path or id of an adapter or a model, got {path_or_id}",
        hint,
    ):
        if not adapter_folder(source):
            return ModelReference(load_base(source, quantize=in_4bit, **model_kwargs), chunk_size, source)
        names = [add_saved_adapter(policy, one, ADAPTER_NAME) for one in (*adapters_below(source), source)]
    return AdapterReference(policy, names, chunk_size, source)
