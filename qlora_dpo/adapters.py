"""Adapters of a policy: which are trained, which only take part, and the model with others or older ones in force.

Every context manager here leaves weights, active adapters and each `requires_grad` as they were, even after an error.
"""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.offload import require_frozen_embeddings

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that subtract the adapter's start from the base's weights."""


@contextlib.contextmanager
def adapters_disabled(policy: PeftModel) -> Iterator[None]:
    """The base model inside the block.

    PEFT's own context manager leaves all weights of the active adapter trainable, also those the user had frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with policy.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def adapters_active(policy: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Only the named adapters in force inside the block.

    Sets what PEFT's layers read in their forward pass and nothing else: its `set_adapter` decides anew what is trained.
    """
    layers = [m for m in policy.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = list(names)
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


@contextlib.contextmanager
def weights_replaced(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Other values in some parameters inside the block, of whatever shape their modules can compute with."""
    held = [(parameter, parameter.data) for parameter, _ in weights]
    try:
        for parameter, value in weights:
            parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def trained_adapters(policy: PeftModel) -> list[str]:
    """Active adapters with a weight that is trained; all active ones if none has."""
    names = list(policy.active_adapters)
    trained = [name for name in names if any(p.requires_grad for p in adapter_weights(policy, [name]).values())]
    return trained or names


def frozen_adapters(policy: PeftModel) -> list[str]:
    """Active adapters that only take part."""
    trained = trained_adapters(policy)
    return [name for name in policy.active_adapters if name not in trained]


def adapter_weights(policy: PeftModel, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of the named adapters, by their name in the policy."""
    inside = [name for name, p in policy.named_parameters() if set(name.split(".")) & set(names)]
    parameters = dict(policy.named_parameters())
    return {name: parameters[name] for name in inside if policy.base_model.prefix in name or _is_auxiliary(name)}


def _is_auxiliary(name: str) -> bool:
    """Whether a parameter belongs to a module that PEFT trains whole, or to tokens that it trains."""
    return ".modules_to_save." in name or ".token_adapter." in name or "trainable_tokens_" in name


def base_weights(policy: PeftModel) -> dict[str, Tensor]:
    """Parameters and buffers of the base model, named as without adapters."""
    tensors = [*policy.get_base_model().named_parameters(), *policy.get_base_model().named_buffers()]
    found = {}
    for name, tensor in tensors:
        if policy.base_model.prefix not in name and not _is_auxiliary(f".{name}"):
            found[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return found


def computed_buffers(policy: PeftModel) -> set[str]:
    """Names, as `base_weights` has them, of buffers that no file holds; some follow what the model has seen (RoPE)."""
    modules = policy.get_base_model().named_modules()
    names = {f"{path}.{leaf}" for path, module in modules for leaf in module._non_persistent_buffers_set}
    return {name.replace(".base_layer", "").replace(".original_module", "") for name in names}


def is_fresh(policy: PeftModel, names: Sequence[str] | None = None) -> bool:
    """Whether every LoRA layer of the named (or active) adapters still adds exactly nothing: A or B is all zeros."""
    chosen = list(policy.active_adapters if names is None else names)
    if any(getattr(policy.peft_config[name], "use_dora", False) for name in chosen):
        return False  # its normalisation rounds, so that it does not start at the base to the last bit
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            for a, b in _factors(module, chosen):
                if bool(a.any()) and bool(b.any()):
                    return False
        elif isinstance(module, BaseTunerLayer):
            return False  # of another kind, which only a comparison could judge
    return True


def _factors(layer: LoraLayer, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """The A and B of a LoRA layer's named adapters, of linear and embedding layers alike."""
    linear = [(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names if n in layer.lora_A]
    embedding = [(layer.lora_embedding_A[n], layer.lora_embedding_B[n]) for n in names if n in layer.lora_embedding_A]
    return linear + embedding


def require_usable(policy: PeftModel) -> None:
    """Refuse policies that the layouts cannot carry, that no checkpoint could hold, or that are not what they seem.

    Raises:
        NotImplementedError: For prompt learning, activated LoRA, AdaLoRA, and kinds that draw numbers or mix tokens.
        ValueError: For merged or disabled adapters, trainable weights of the base, and trained embeddings on the CPU.
    """
    require_frozen_embeddings(policy)
    for name in policy.active_adapters:
        require_token_adapter(policy.peft_config[name])
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    for state, call in (("merged", "unmerge_adapter() or merge_and_unload()"), ("disabled", "enable_adapter_layers()")):
        if any(layer.merged if state == "merged" else layer.disable_adapters for layer in layers):
            raise ValueError(f"The adapters of a policy must be in force, got {state} ones. Call {call} first.")
    prefix = policy.base_model.prefix
    biases = any(getattr(policy.peft_config[name], "bias", "none") != "none" for name in policy.active_adapters)
    strays = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and prefix not in name and not _is_auxiliary(name)
        if not (biases and name.endswith(".bias"))
    ]
    if strays:
        raise ValueError(
            f"Only adapter weights must be trainable, got {strays[:3]} too, which no saved adapter would hold. Freeze "
            "them with requires_grad_(False), or name their modules in `modules_to_save`."
        )


def require_trainable(policy: PeftModel) -> None:
    """Refuse to train a policy of which nothing is trained.

    Raises:
        ValueError: If nothing is.
    """
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "The policy must have weights to train, got none. Load its adapter with is_trainable=True, as load_policy "
            "does."
        )


_OF_MORE = {
    "LILY": "whose layers average over all tokens of a forward",
    "PVERA": "whose layers draw random numbers",
    "POLY": "which asks for tasks",
    "XLORA": "which runs the model twice",
    "SHADOW": "which is a model beside the model",
}
"""Kinds of adapters that do more than change what a layer does to each token, and what they do."""


def require_token_adapter(config: PeftConfig) -> None:
    """Refuse an adapter that does more than change what a layer does to each token by itself.

    Raises:
        NotImplementedError: For prompt learning, activated LoRA and AdaLoRA.
    """
    kind = config.peft_type.value
    refused = None
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        refused = f"{kind}, which adds tokens to the row"
    elif getattr(config, "alora_invocation_tokens", None):
        refused = "activated LoRA, which looks for tokens in the row"
    elif kind == "ADALORA":
        refused = "AdaLoRA, whose ranks nothing here updates"
    elif kind in _OF_MORE:
        refused = f"{kind}, {_OF_MORE[kind]}"
    if refused is not None:
        raise NotImplementedError(
            f"The adapter must be made of layers that act on each token, got {refused}. Use LoRA."
        )


def text_prefix(model: PreTrainedModel) -> str:
    """What the names of the layers that text goes through begin with; empty where those are all there are.

    A model that sees images has towers beside its decoder.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return prefix if any(not name.startswith(prefix) for name in linears) else ""


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of experts in one tensor, by name, which neither bitsandbytes quantises nor PEFT adapts as a layer."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if weight.dim() > 2 and "experts" in name}


def without_unfit_layers(config: PeftConfig, base: PreTrainedModel) -> PeftConfig:
    """A config whose `all-linear` leaves out layers that must not be adapted, unless it names some to leave out itself.

    Towers for images, which no text goes through: their adapters would be saved as they began, and processes would wait
    for their gradients. Routers that are linear layers by their class but return a tuple, which PEFT cannot add to. And
    modules that another adapter replaced whole: PEFT cannot save an adapter of the copy, nothing calls the original.
    """
    excluded = getattr(config, "exclude_modules", "")  # a kind of adapter that lacks it, as VeRA, leaves out nothing
    if getattr(config, "target_modules", None) != "all-linear" or excluded is not None:
        return config
    prefix = text_prefix(base)
    named = ((name, module) for name, module in base.named_modules() if isinstance(module, nn.Linear))
    routers = {name.rpartition(".")[2] for name, module in named if "Router" in type(module).__name__}
    patterns = [rf"(?!{re.escape(prefix)}).*"] if prefix else []
    patterns += [rf".*\.{re.escape(name)}" for name in sorted(routers)]
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in base.modules()):
        patterns.append(r".*\.(modules_to_save|original_module)(\..*)?")
    config = copy.copy(config)
    config.exclude_modules = "|".join(patterns) or None
    return config


def changes_base(policy: PeftModel) -> str | None:
    """Why the model with its adapters disabled is not the base that it was, or will not stay it; None if it is."""
    for name in policy.active_adapters:
        config = policy.peft_config[name]
        if loading_changes_base(config):
            return f"`init_lora_weights={config.init_lora_weights!r}` subtracts the adapter's start from the base"
        for option, neutral in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
            value = getattr(config, option, neutral)
            if value not in (neutral, [], None, {}):
                return f"`{option}={value!r}` trains parts of the base"
    return None


def loading_changes_base(config: object) -> bool:
    """Whether loading an adapter with this config would change the base under every other adapter."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)


def trainable_copy(policy: PeftModel) -> list[tuple[nn.Parameter, Tensor]]:
    """Every trainable parameter with a copy of its value."""
    return [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]


def lora_linears(policy: PeftModel, name: str) -> dict[str, LoraLayer]:
    """LoRA layers that hold the adapter as a product B A, by their name in the policy.

    Raises:
        NotImplementedError: If the adapter is more than such products.
    """
    odd = changes_base(policy)
    layers = {n: m for n, m in policy.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    products = {f"{n}.lora_{side}.{name}.weight" for n in layers for side in "AB"}
    others = sorted(set(adapter_weights(policy, [name])) - products)
    if odd is None and (others or getattr(policy.peft_config[name], "target_parameters", None)):
        odd = f"it has more than products of two matrices ({others[:1] or 'target_parameters'})"
    if odd is None and any(m.lora_A[name].weight.dim() != 2 for m in layers.values()):
        odd = "it has convolutions"
    if odd is not None:
        raise NotImplementedError(
            f"`sync_ref_model` must have a plain LoRA on linear layers, got another: {odd}. Leave the option out."
        )
    return layers


def free_name(policy: PeftModel, stem: str) -> str:
    """A name that no adapter of the policy has: the stem, or the stem and a number."""
    names = (stem, *(f"{stem}_{i}" for i in range(2, len(policy.peft_config) + 3)))
    return next(name for name in names if name not in policy.peft_config)


def train_in_fp32(policy: PeftModel) -> None:
    """Whatever is trained in fp32, whatever the base's dtype.

    bf16 weights keep only a tenth of their updates at a learning rate of 5e-6.
    """
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def stack_adapter(policy: PeftModel, peft_config: PeftConfig) -> str:
    """A new adapter on a policy whose adapters are frozen and stay in force; returns its name.

    Its weights are in fp32, whatever the base's dtype.
    """
    below = list(policy.active_adapters)
    name = "default" if "default" not in policy.peft_config else free_name(policy, "dpo")
    lower = policy.peft_config[below[-1]]
    if getattr(lower, "trainable_token_indices", None):
        raise NotImplementedError(
            f"An adapter to stack on must not train tokens, which PEFT cannot save above it, got {below[-1]!r}. Merge "
            "it into its base first."
        )
    peft_config.base_model_name_or_path, peft_config.revision = lower.base_model_name_or_path, lower.revision
    policy.add_adapter(name, without_unfit_layers(peft_config, policy.get_base_model()))
    nested = [n for n, m in policy.named_modules() if ".modules_to_save." in n and isinstance(m, BaseTunerLayer)]
    if nested:
        raise NotImplementedError(
            f"A module that the adapter below replaced whole must not be adapted above it, which PEFT cannot save, got "
            f"{nested[0].removeprefix('base_model.model.')}. Leave it out of `target_modules`, or merge the one below "
            "into its base first."
        )
    policy.base_model.set_adapter([*below, name])
    mine = adapter_weights(policy, [name])
    for other, parameter in policy.named_parameters():
        parameter.requires_grad_(other in mine)
    train_in_fp32(policy)
    return name
