"""Sizes of a model, read from its config alone: no weight is downloaded or allocated.

Every model takes one way: its config becomes a model on the meta device, whose layers are counted. The built-in shapes
are arguments of transformers' own configs.
"""

import difflib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from qlora_dpo.lean import is_gated_mlp, norm_rule
from qlora_dpo.logits import LogitRule
from qlora_dpo.paths import check_path

_COLUMNS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)

_BUILT_IN: dict[str, tuple[str, tuple[int, ...]]] = {
    "llama-3.2-1b": ("LlamaConfig", (2048, 16, 32, 8, 64, 8192, 128256, True)),
    "llama-3.2-3b": ("LlamaConfig", (3072, 28, 24, 8, 128, 8192, 128256, True)),
    "llama-3.1-8b": ("LlamaConfig", (4096, 32, 32, 8, 128, 14336, 128256, False)),
    "llama-3.1-70b": ("LlamaConfig", (8192, 80, 64, 8, 128, 28672, 128256, False)),
    "qwen2.5-0.5b": ("Qwen2Config", (896, 24, 14, 2, 64, 4864, 151936, True)),
    "qwen2.5-1.5b": ("Qwen2Config", (1536, 28, 12, 2, 128, 8960, 151936, True)),
    "qwen2.5-3b": ("Qwen2Config", (2048, 36, 16, 2, 128, 11008, 151936, True)),
    "qwen2.5-7b": ("Qwen2Config", (3584, 28, 28, 4, 128, 18944, 152064, False)),
    "qwen2.5-14b": ("Qwen2Config", (5120, 48, 40, 8, 128, 13824, 152064, False)),
    "qwen2.5-32b": ("Qwen2Config", (5120, 64, 40, 8, 128, 27648, 152064, False)),
    "qwen2.5-72b": ("Qwen2Config", (8192, 80, 64, 8, 128, 29568, 152064, False)),
    "qwen3-4b": ("Qwen3Config", (2560, 36, 32, 8, 128, 9728, 151936, True)),
    "qwen3-8b": ("Qwen3Config", (4096, 36, 32, 8, 128, 12288, 151936, False)),
    "qwen3-14b": ("Qwen3Config", (5120, 40, 40, 8, 128, 17408, 151936, False)),
    "qwen3-32b": ("Qwen3Config", (5120, 64, 64, 8, 128, 25600, 151936, False)),
    "mistral-7b": ("MistralConfig", (4096, 32, 32, 8, 128, 14336, 32768, False)),
    "gemma-2-2b": ("Gemma2Config", (2304, 26, 8, 4, 256, 9216, 256000, True)),
    "gemma-2-9b": ("Gemma2Config", (3584, 42, 16, 8, 256, 14336, 256000, True)),
    "gemma-2-27b": ("Gemma2Config", (4608, 46, 32, 16, 128, 36864, 256000, True)),
    "gemma-3-1b": ("Gemma3TextConfig", (1152, 26, 4, 1, 256, 6912, 262144, True)),
    "gemma-3-4b": ("Gemma3TextConfig", (2560, 34, 8, 4, 256, 10240, 262208, True)),
    "gemma-3-12b": ("Gemma3TextConfig", (3840, 48, 16, 8, 256, 15360, 262208, True)),
    "phi-4": ("Phi3Config", (5120, 40, 40, 10, 128, 17920, 100352, False)),
}
"""Config class and `_COLUMNS` of models by name; Gemma 3 without its vision tower."""

BUILT_IN = tuple(_BUILT_IN)
"""Names that `shape_of` knows without network."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM, in elements.

    Attributes:
        name: What the user called it.
        hidden: Size of a hidden state.
        layers: Decoder layers.
        query: All query heads of a token together.
        key_value: All key heads of a token together; as many values.
        head_dim: One head.
        intermediate: Input of the MLP's last matrix.
        expanded: Outputs of the MLP's other matrices together: twice `intermediate` where it is gated.
        vocabulary: Rows of the LM head.
        softcap: Whether the logits are soft-capped.
        hidden_norms: Norms of a hidden state in a layer.
        head_norms: Whether queries and keys are normalised too.
        lean_norms: Whether the norms are such that `lean` has them keep their input as it comes.
        lean_mlp: Whether the MLP is one that `lean` has keep gate and up only.
        linears: `(inputs, outputs)` of each linear layer but the head.
        layer_linears: The same of one decoder layer.
        embeddings: Weights of the embeddings.
        head: Weights of the LM head that are not the embeddings: 0 if it is tied to them.
        other: All other weights: norms, biases.
    """

    name: str
    hidden: int
    layers: int
    query: int
    key_value: int
    head_dim: int
    intermediate: int
    expanded: int
    vocabulary: int
    softcap: bool
    hidden_norms: int
    head_norms: bool
    lean_norms: bool
    lean_mlp: bool
    linears: tuple[tuple[int, int], ...]
    layer_linears: tuple[tuple[int, int], ...]
    embeddings: int
    head: int
    other: int

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(i * o for i, o in self.linears) + self.embeddings + self.head + self.other

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer but the head."""
        return max(i * o for i, o in self.linears)


def shape_of(config_or_name: PreTrainedConfig | str) -> Shape:
    """Sizes of a model.

    Args:
        config_or_name: A config of transformers, a name in `BUILT_IN`, a folder or a Hub id (only config.json is read).

    Raises:
        OSError: If the config cannot be had.
        NotImplementedError: For a mixture of experts.
    """
    if not isinstance(config_or_name, str):
        config = config_or_name.get_text_config()
        return _shape(config, getattr(config_or_name, "_name_or_path", "") or config.model_type)
    return _named_shape(config_or_name)


def built_in_config(name: str) -> PreTrainedConfig:
    """The config of a model in `BUILT_IN`: its sizes, and all else as the family's default has it."""
    kind, sizes = _BUILT_IN[name.lower()]
    return getattr(transformers, kind)(**dict(zip(_COLUMNS, sizes, strict=True)), pad_token_id=0)


@functools.lru_cache(maxsize=32)
def _named_shape(name: str) -> Shape:
    if name.lower() in _BUILT_IN:
        return _shape(built_in_config(name), name)
    try:
        config = AutoConfig.from_pretrained(check_path(name, "model"))
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(name.lower().split("/")[-1], BUILT_IN, n=1, cutoff=0.4)
        hint = f"; a built-in shape with a name like it is {close[0]}" if close else ""
        raise OSError(
            f"`model` must be a folder or Hub id with a config.json, or a built-in name, got {name} ({error}){hint}. "
            "See the built-in names with `qlora-dpo plan --list`."
        ) from error
    return _shape(config.get_text_config(), name)


def _shape(config: PreTrainedConfig, name: str) -> Shape:
    """Count the layers of a model on the meta device."""
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        raise NotImplementedError(
            f"`model` must be without experts, got {name}: bitsandbytes leaves stacked experts in 16 bit, and which "
            "tokens they get is not known beforehand."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    tied = head.weight is embeddings
    linears = _linears(model, head)
    total = sum(parameter.numel() for parameter in model.parameters())  # each once, tied or not
    in_head = 0 if tied else head.weight.numel()
    matrices = sum(i * o for i, o in linears.values())
    layer = _decoder_layer(model, config)
    inside = _linears(layer)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    mlp = {key: sizes for key, sizes in inside.items() if "att" not in key}  # attn, attention, self_attention
    modules = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    norms = [tuple(module.get_parameter("weight").shape) for module in modules if hasattr(module, "weight")]
    return Shape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        query=config.num_attention_heads * head_dim,
        key_value=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
        head_dim=head_dim,
        intermediate=intermediate,
        expanded=sum(o for _, o in mlp.values() if o != config.hidden_size),
        vocabulary=head.weight.shape[0],
        softcap=bool(LogitRule.from_config(config).softcap),
        hidden_norms=norms.count((config.hidden_size,)),
        head_norms=(head_dim,) in norms,
        lean_norms=all(norm_rule(module) for module in modules),
        lean_mlp=any(is_gated_mlp(module) for module in layer.modules()),
        linears=tuple(linears.values()),
        layer_linears=tuple(inside.values()),
        embeddings=embeddings.numel(),
        head=in_head,
        other=total - embeddings.numel() - in_head - matrices,
    )


def _linears(module: nn.Module, but: Any = None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer, by name: what bitsandbytes quantises and PEFT adapts."""
    found = {}
    for key, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer is not but:
            found[key] = (layer.in_features, layer.out_features)
        elif isinstance(layer, Conv1D):
            found[key] = (layer.nx, layer.nf)
    return found


def _decoder_layer(model: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """The first decoder layer.

    Raises:
        NotImplementedError: If the model has no list of them.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module[0]
    raise NotImplementedError(f"`model` must have a list of decoder layers, got none in {type(model).__name__}.")
