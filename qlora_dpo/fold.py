"""The weights of a model with adapters folded into them, one layer at a time.

The model itself never exists: a skeleton on the meta device carries PEFT's layers with the adapters' weights. A layer
gets its own base weight in fp32, PEFT merges into it, the result is taken out, and the weight goes again.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_dpo.adapters import adapter_weights, base_weights, require_token_adapter
from qlora_dpo.model import require_intact_base
from qlora_dpo.paths import local_adapter
from qlora_dpo.shards import Checkpoint
from qlora_dpo.weights import load_adapter_weights, require_same_rows

_KINDS = (
    *("LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "FOURIERFT", "LN_TUNING", "VERA", "RANDLORA"),
    *("TRAINABLE_TOKENS", "C3A", "MISS", "WAVEFT", "GRALORA", "ROAD"),
)
"""Kinds of adapters whose merged model a test compares with the policy, as PEFT spells them."""


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM of a config without weights."""
    with torch.device("meta"):
        own = copy.deepcopy(config)  # which a model that is resized changes
        return AutoModelForCausalLM.from_config(own, trust_remote_code=trust_remote_code)


class BaseWeights:
    """The weights of a base, in the arithmetic that the adapter was trained on or as they are stored.

    Attributes:
        model: The model without its weights.
        names: Every parameter of the model that has a tensor of its own in the files, with that tensor's name.
        tied: Every parameter that is one and the same with others, with those.
        replaced: Parameters that are not those of the files: of a vocabulary that was resized before training.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        quantization: BitsAndBytesConfig | None = None,
        dtype: torch.dtype | None = None,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> None:
        """With a quantisation or a dtype, the weights as they were loaded with it; without, as they are stored.

        The model is a skeleton for this object alone.
        """
        self.checkpoint, self.dtype, self.model = checkpoint, dtype, model
        self.replaced = replaced or {}
        self.names = _parameter_names(checkpoint.names(), model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self.tied = _tied(model)
        self._transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self._layers = {} if quantization is None else _four_bit_layers(model, quantization)
        lost = [path for path in self._layers if f"{path}.weight" not in self.names]
        if lost:
            raise NotImplementedError(
                f"Every layer of the 4-bit base must have a tensor of its own in the files of {checkpoint.source}, got "
                f"none for {lost[:3]}. Use into='original'."
            )

    def source(self, name: str) -> str | None:
        """The tensor in the files that a parameter is loaded from: its own, or that of one it is tied to."""
        return next((self.names[one] for one in (name, *self.tied.get(name, ())) if one in self.names), None)

    def value(self, name: str) -> Tensor:
        """A parameter, in the orientation of the files."""
        own = next((one for one in (name, *self.tied.get(name, ())) if one in self.replaced), None)
        if own is not None:
            return self.replaced[own]
        source = self.source(name)
        assert source is not None
        path, _, leaf = name.rpartition(".")
        if self.checkpoint.packed(source):
            return self._turned(self.checkpoint.dequantized(source), path)
        stored = self.checkpoint.tensor(source)
        if self.dtype is None or not stored.is_floating_point():
            return stored
        loaded = stored.to(self.loaded_dtype(name, self.dtype))
        if path not in self._layers or leaf != "weight":
            return loaded
        return self._turned(_quantized_and_back(self._turned(loaded, path), self._layers[path]), path)

    def part(self, key: str) -> Tensor:
        """A tensor of the files that has no parameter of its own, in the dtype it is loaded in."""
        stored = self.checkpoint.tensor(key)
        if self.dtype is None or not stored.is_floating_point():
            return stored
        return stored.to(self.loaded_dtype(key, self.dtype))

    def loaded_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a tensor is in if its model is loaded in a dtype: transformers keeps some (routers' biases) in fp32."""
        plan = self.model._get_dtype_plan(dtype)
        return torch.float32 if plan and build_glob_alternation(list(plan))[0].search(name) else dtype

    def _turned(self, weight: Tensor, path: str) -> Tensor:
        """Between `(in, out)`, as GPT-2's layers are stored, and `(out, in)`, as bitsandbytes takes them."""
        return weight.t().contiguous() if path in self._transposed else weight


def _four_bit_layers(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> dict[str, Linear4bit]:
    """The layers that transformers would load in 4 bit, made so in the skeleton, by their path.

    Raises:
        NotImplementedError: If they would be in 8 bit.
    """
    if not quantization.load_in_4bit:
        raise NotImplementedError("The base must be in 4 bit to be dequantised, got 8 bit. Use into='original'.")
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def _quantized_and_back(weight: Tensor, layer: Linear4bit) -> Tensor:
    """A weight as the 4-bit layer multiplies with it, in the dtype it came in.

    Quantised where training would do it: a GPU and a CPU need not round alike.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    options = {name: getattr(layer.weight, name) for name in ("blocksize", "compress_statistics", "quant_type")}
    options["quant_storage"] = layer.weight.quant_storage
    packed = Params4bit(weight, requires_grad=False, **options).to(device)
    return dequantize_4bit(packed.data, packed.quant_state).to("cpu", weight.dtype)


def _parameter_names(keys: Sequence[str], model: PreTrainedModel) -> dict[str, str]:
    """Parameters of the model by name, with the tensor in the files that each one alone is loaded from.

    transformers renames tensors while it loads them, and puts some together (experts) or takes them apart: those have
    no entry, and are only carried over.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()
    found: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known:  # a renaming that was not meant for it; the prefix may still be
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if pattern is None and name in known:
            found[name] = key
    return found


def _tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """Parameters that are one and the same, each with the names of the others."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in group if other != name]
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


class Fold:
    """Adapters over a base whose weights come and go.

    Attributes:
        layers: Layers and whole modules that the adapters change.
    """

    def __init__(self, base: BaseWeights, model: PreTrainedModel, adapters: Sequence[str]) -> None:
        """Load the adapters, lowest first, on a skeleton of their own.

        Raises:
            NotImplementedError: If they cannot be folded into weights.
            ValueError: If they do not fit the model, or a layer that they change has no tensor in the files.
        """
        for adapter in adapters:
            _require_foldable(adapter)
            require_same_rows(base.model, adapter, base.value)
        self.base = base
        policy = _policy_skeleton(model, adapters)
        self._adapters = list(policy.peft_config)
        self._biases = {
            name: value.float()
            for name, value in base_weights(policy).items()
            if name.endswith(".bias") and not value.is_meta  # biases that an adapter trained lie in its file
        }
        modules = dict(_changed_modules(policy))
        self.layers = len(modules)
        self._wrapped = {path: wrapper for path, wrapper in modules.items() if isinstance(wrapper, ParamWrapper)}
        self._touched = {path: module for path, module in modules.items() if path not in self._wrapped}
        self._added = {name: path for path in self._wrapped for name in self._wrappers(path)}
        self._parts = self._parts_in_files()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        wanted = [n for n in base.shapes if self._owner(n) is not None or n in self._biases or n in self._added]
        lost = [name for name in wanted if base.source(name) is None and name not in self._parts.values()]
        if lost:
            raise NotImplementedError(
                f"Every weight that the adapter changes must have a tensor of its own in the files of "
                f"{base.checkpoint.source}, got none for {lost[:3]}. Serve base and adapter apart."
            )

    def changes(self, name: str) -> bool:
        """Whether a parameter is another than in the base."""
        return self._owner(name) is not None or name in self._biases or name in self._added

    def value(self, name: str) -> Tensor:
        """A parameter with the adapters in it: in fp32 if they change it, as the base has it if not."""
        if name in self._added:
            return self.base.value(name).float() + self._change(name)
        owner = self._owner(name)
        if owner is None:
            return self._biases[name] if name in self._biases else self.base.value(name)
        if self._last[0] != owner:
            self._last = ("", {})  # let go of the last layer before the next one is made
            self._last = (owner, self._folded(owner))
        return self._last[1][name.removeprefix(f"{owner}.")]

    def part(self, key: str) -> Tensor:
        """A tensor of the files that the model puts together with others, with the adapters in it.

        Raises:
            NotImplementedError: If what the adapters change cannot be taken apart as the files are.
        """
        stored = self.base.part(key)
        if key not in self._parts:
            return stored
        change = self._change(key)
        if change.shape != stored.shape:
            raise NotImplementedError(
                f"Experts must lie in the files as transformers writes them, got {list(stored.shape)} for {key}, not "
                f"{list(change.shape)}. Load the base in 16 bit, save it with save_pretrained, and name that folder."
            )
        return stored.float() + change

    def _wrappers(self, path: str) -> dict[str, Any]:
        """PEFT's wrappers around bare parameters of a module (one in the other), by the parameter's name."""
        found, wrapper = {}, self._wrapped[path]
        while isinstance(wrapper, ParamWrapper):
            found[f"{path}.{wrapper.parameter_name}"] = wrapper
            wrapper = wrapper.base_layer
        return found

    def _parts_in_files(self) -> dict[str, str]:
        """Tensors of the files that the model puts a wrapped parameter together from, with that parameter."""
        whole = {name: torch.empty(self.base.shapes[name], device="meta") for name in self._added}
        known = set(self.base.checkpoint.names())
        found = {
            key: name
            for name, empty in whole.items()
            if name not in self.base.names
            for key in revert_weight_conversion(self.base.model, {name: empty})
        }
        return found if found.keys() <= known else {}

    def _change(self, name: str) -> Tensor:
        """What the adapters add to a wrapped parameter, or to a part of one in the files, in fp32."""
        path = self._added[self._parts.get(name, name)]
        if self._last[0] != path:
            self._last = ("", {})
            changes = {one: self._added_to(wrapper) for one, wrapper in self._wrappers(path).items()}
            apart = {one: changes.pop(one) for one in list(changes) if one not in self.base.names}
            self._last = (path, changes | (revert_weight_conversion(self.base.model, apart) if apart else {}))
        return self._last[1][name]

    @torch.no_grad()
    def _added_to(self, wrapper: Any) -> Tensor:
        """The sum of what each adapter adds to the wrapped parameter."""
        inner, leaf = wrapper.get_base_layer(), wrapper.parameter_name
        empty = getattr(inner, leaf)
        # PEFT takes its dtype and device from the parameter
        setattr(inner, leaf, nn.Parameter(torch.zeros(()).expand(empty.shape), requires_grad=False))
        found: Tensor = sum(wrapper.get_delta_weight(name) for name in self._adapters if name in wrapper.lora_A)
        setattr(inner, leaf, empty)
        return found

    def _owner(self, name: str) -> str | None:
        """The changed layer or module that a parameter belongs to."""
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        return next((path for path in paths if path in self._touched), None)

    def _folded(self, path: str) -> dict[str, Tensor]:
        """The parameters of a layer or module with the adapters in them, in fp32."""
        module = self._touched[path]
        if isinstance(module, ModulesToSaveWrapper):
            saved = [copy for name, copy in module.modules_to_save.items() if name in self._adapters]
            return {name: tensor.detach().float() for name, tensor in saved[-1].named_parameters()}
        return self._merged(path, module)

    def _merged(self, path: str, layer: Any) -> dict[str, Tensor]:
        """PEFT's own merge of one layer, whose base weight is here for that long only.

        Raises:
            NotImplementedError: If PEFT cannot merge it, or the merged layer computes something else.
        """
        inner = layer.get_base_layer()
        empty = dict(inner.named_parameters(recurse=False))
        for leaf in empty:
            name = f"{path}.{leaf}"
            value = self._biases[name] if name in self._biases else self.base.value(name)
            setattr(inner, leaf, nn.Parameter(value.to(torch.float32, copy=True), requires_grad=False))
        names = [name for name in self._adapters if name in layer._get_available_adapters()]
        try:
            with torch.autocast("cpu", enabled=False):
                merged = _checked_merge(layer, names)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
            raise NotImplementedError(
                f"The adapter must be one that PEFT can merge, got {path}: {error} Serve base and adapter apart."
            ) from error
        found = {leaf: parameter.detach() for leaf, parameter in merged.named_parameters(recurse=False)}
        if merged is not inner:
            layer.unmerge()  # the next merge of it begins with the base's module again
        for leaf, parameter in empty.items():
            setattr(inner, leaf, parameter)
        layer.merged_adapters.clear()
        return found


@torch.no_grad()
def _checked_merge(layer: Any, names: list[str]) -> nn.Module:
    """PEFT's merge of a layer: the module with the merged weights, once it computes what layer and adapters do.

    Raises:
        RuntimeError: If it does not, to a hundredth of what the adapters change beyond rounding.
    """
    inner = layer.get_base_layer()
    layer._active_adapter = names
    for leaf, buffer in inner.named_buffers(recurse=False):
        if buffer.is_meta:  # a scale of embeddings, which any number can stand for here
            setattr(inner, leaf, torch.ones(buffer.shape, dtype=torch.float32))
    inputs = _probe(layer, inner)
    base, wanted = inner(inputs), layer(inputs)
    layer.merge(safe_merge=True, adapter_names=names)
    merged: nn.Module = layer.get_base_layer()
    off, change = (merged(inputs) - wanted).norm(), (wanted - base).norm()
    if not off <= 0.01 * change + 1e-5 * base.norm():
        raise RuntimeError(f"merged it is off by {off / change:.1%} of what the adapter changes.")
    return merged


def _probe(layer: Any, inner: nn.Module) -> Tensor:
    """Some input of a layer: ids with those whose embeddings are trained, or random numbers in the layer's shape."""
    if isinstance(inner, nn.Embedding):
        trained = [torch.as_tensor(ids) for ids in getattr(layer, "token_indices", {}).values()]
        return torch.cat([torch.linspace(0, inner.num_embeddings - 1, 64).long(), *trained])
    weight = inner.get_parameter("weight")
    shape: tuple[int, ...] = (8, weight.shape[0 if isinstance(inner, Conv1D) else -1])
    if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = (8, inner.in_channels, *inner.kernel_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def _policy_skeleton(model: PreTrainedModel, adapters: Sequence[str]) -> PeftModel:
    """Adapters with their weights, in fp32, on a base without any."""
    configs = {f"folded_{number}": PeftConfig.from_pretrained(local_adapter(a)) for number, a in enumerate(adapters)}
    names = list(configs)
    with warnings.catch_warnings():
        # PEFT's remarks on options of the saved config, which training has made already
        warnings.simplefilter("ignore", UserWarning)
        policy = PeftModel(model, configs[names[0]], names[0], low_cpu_mem_usage=True)
        for name, adapter in zip(names, adapters, strict=True):  # each before the next: PEFT looks for its tokens there
            if name != names[0]:
                policy.add_adapter(name, configs[name], low_cpu_mem_usage=True)
            _give_storage(policy, name)
            load_adapter_weights(policy, adapter, name)
            _require_loaded(policy, name, adapter)
    return policy.requires_grad_(False).eval()


def _give_storage(policy: PeftModel, name: str) -> None:
    """Put what an adapter's file holds on the CPU, in fp32: not a number until it is loaded."""
    ends = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(getattr(policy.peft_config[name], "bias", "none"))
    adapter = adapter_weights(policy, [name])
    biases = {n: p for n, p in policy.named_parameters() if ends is not None and n.endswith(ends) and n not in adapter}
    made = {
        id(old): nn.Parameter(torch.full(old.shape, torch.nan), requires_grad=False)
        for old in (adapter | biases).values()
        if old.is_meta
    }
    for module in policy.modules():
        for leaf, old in list(module._parameters.items()):
            if id(old) in made:  # in every place that shares it
                module._parameters[leaf] = made[id(old)]
        shared = module._buffers.get(name)  # a random matrix of all layers
        if shared is not None and shared.is_meta and shared.is_floating_point():
            module._buffers[name] = torch.full(shared.shape, torch.nan)


def _require_loaded(policy: PeftModel, name: str, adapter: str) -> None:
    """Refuse an adapter whose layers need numbers that its file does not hold: PEFT would merge what is not there.

    Raises:
        NotImplementedError: If one does.
    """
    held = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    held = {key: tensor for key, tensor in held.items() if name in key.split(".")}
    whole = {key for key, _ in policy.named_buffers() if f"modules_to_save.{name}." in key}  # the base's own
    held = {key: tensor for key, tensor in held.items() if key not in whole}
    copies = "trainable_tokens_original"  # of the base, to undo a merge with
    lost = [k for k, tensor in held.items() if copies not in k and (tensor.is_meta or bool(tensor.isnan().any()))]
    if lost:
        raise NotImplementedError(
            f"The adapter {adapter} must hold every number that its layers compute with to be merged, got none for "
            f"{lost[0].replace(f'.{name}', '')}. Load the base in 16 bit and use PEFT's merge_and_unload."
        )


def _changed_modules(policy: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Layers with adapters and modules that are replaced whole, by their path in the base; the outermost only.

    Raises:
        NotImplementedError: If one layer has adapters of two kinds.
    """
    last = None
    for path, module in policy.get_base_model().named_modules():
        if last is not None and path.startswith(f"{last}."):
            continue
        if isinstance(module, TrainableTokensWrapper):
            found: Any = module.token_adapter
        elif isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            found = module
        else:
            continue
        inside = getattr(found, "base_layer", None)
        if isinstance(found, ParamWrapper):
            inside = None  # one more for each parameter of its module
        if isinstance(inside, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise NotImplementedError(
                f"A layer must have adapters of one kind to be merged, got {path}. Serve base and adapter apart."
            )
        last = path
        yield path, found


def _require_foldable(adapter: str) -> None:
    """Refuse kinds of adapters that are no change of weights.

    Raises:
        NotImplementedError: For prompt learning, activated LoRA, AdaLoRA, other kinds whose merge no test covers, and
            repeated layers.
        ValueError: If loading the adapter would change the base.
    """
    config = PeftConfig.from_pretrained(local_adapter(adapter))
    require_token_adapter(config)
    require_intact_base(adapter)
    if config.peft_type.value not in _KINDS:
        raise NotImplementedError(
            f"The adapter must be of a kind whose merge is tested ({', '.join(_KINDS)}), got {config.peft_type.value}. "
            "Load the base in 16 bit and use PEFT's merge_and_unload."
        )
    if getattr(config, "layer_replication", None):
        raise NotImplementedError(
            f"`layer_replication` must be unset to merge, got {config.layer_replication}: the base's files hold each "
            "layer once. Serve base and adapter apart."
        )
