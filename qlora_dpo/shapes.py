"""Sizes of a model, read from its config alone: no weight is downloaded or allocated.

Every model takes one way: its config becomes a model on the meta device, whose layers are counted. The first one runs
there, so that its own code says what it keeps for a backward pass. The built-in shapes are arguments of transformers'
own configs.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import threading
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from qlora_dpo.adapters import stacked_experts, text_prefix
from qlora_dpo.attention import attention_backend
from qlora_dpo.footprint import GATHERED, Attention, Kept, LayerCase, Shape
from qlora_dpo.lean import is_gated_mlp, norm_rule
from qlora_dpo.logits import LogitRule, widen
from qlora_dpo.paths import at_revision, with_revision
from qlora_dpo.recompute import decoder_layers

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


def shape_of(config_or_name: PreTrainedConfig | str) -> Shape:
    """Sizes of a model.

    Args:
        config_or_name: A config of transformers, a name in `BUILT_IN`, a folder, or a Hub id, perhaps as `id@revision`
            (only config.json is read).

    Raises:
        OSError: If the config cannot be had.
        ValueError: If the model is no causal LM of transformers, or has no such revision.
        NotImplementedError: For a model with experts, or whose layers are not all alike or not attention and an MLP.
    """
    if not isinstance(config_or_name, str):
        return _shape(config_or_name, getattr(config_or_name, "_name_or_path", "") or config_or_name.model_type)
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
        source, options = with_revision(name, {})
        with at_revision("model", source, options.get("revision")):
            config = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        close = difflib.get_close_matches(name.lower().split("/")[-1], BUILT_IN, n=1, cutoff=0.4)
        hint = f"; a built-in shape with a name like it is {close[0]}" if close else ""
        raise OSError(
            f"`model` must be a folder or Hub id with a config.json, or a built-in name, got {name} ({error}){hint}. "
            "See the built-in names with `qlora-dpo plan --list`."
        ) from error
    return _shape(config, name)


def _shape(config: PreTrainedConfig, name: str) -> Shape:
    """Count the layers of a model on the meta device, all of it: beside a text model's layers those of its towers.

    Raises:
        NotImplementedError: If it is not built as transformers builds its decoders.
    """
    try:
        with _ONE_AT_A_TIME:
            return _counted(config, name)
    except (AttributeError, TypeError) as error:
        raise _unplanned("be built as transformers' decoders are", name, f"what is not ({error})") from error


def _counted(config: PreTrainedConfig, name: str) -> Shape:
    text, model = config.get_text_config(), _skeleton(config, name)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    linears = _linears(model, head)
    total = sum(parameter.numel() for parameter in model.parameters())  # each once, tied or not
    in_head = 0 if head.weight is embeddings else head.weight.numel()
    matrices = sum(i * o for i, o in linears.values())
    layer = _decoder_layer(model, name)
    inside = _linears(layer)
    intermediate, expanded = _mlp_sizes(inside, text.hidden_size, name)
    attention, kept = _run_layer(model, layer, name, intermediate)
    norms = _norms(layer)
    sizes = [
        tuple(module.get_parameter("weight").shape) for module in norms if getattr(module, "weight", None) is not None
    ]
    return Shape(
        name=name,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        attention=attention,
        intermediate=intermediate,
        expanded=expanded,
        vocabulary=head.weight.shape[0],
        softcap=bool(LogitRule.from_config(text).softcap),
        hidden_norms=sizes.count((text.hidden_size,)),
        lean_norms=all(norm_rule(module) for module in norms),
        lean_mlp=any(is_gated_mlp(module) for module in layer.modules()),
        kept=kept,
        linears=tuple(linears.values()),
        adapted=tuple(sizes for path, sizes in linears.items() if path.startswith(text_prefix(model))),
        layer_linears=tuple(inside.values()),
        embeddings=embeddings.numel(),
        head=in_head,
        other=total - embeddings.numel() - in_head - matrices,
    )


def _skeleton(config: PreTrainedConfig, name: str) -> Any:
    """The model without data, as it is loaded.

    Raises:
        ValueError: If transformers has no causal LM for the config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    except Exception as error:  # a family's own code says in its own way what it lacks
        raise ValueError(
            f"`model` must be a causal LM of transformers, got {name} ({_reason(error)}). Name one that is."
        ) from error


def _reason(error: Exception) -> str:
    """The kind of an error, and its first words."""
    words = " ".join(str(error).split()).split(" for this kind")[0]
    return f"{type(error).__name__}: {words[:160]}"


def _linears(module: nn.Module, but: Any = None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer, by name: what bitsandbytes quantises and PEFT adapts."""
    found = {key: _sizes(layer) for key, layer in module.named_modules() if layer is not but}
    return {key: sizes for key, sizes in found.items() if sizes}


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if "norm" in type(module).__name__.lower()]


def _mlp_sizes(linears: dict[str, tuple[int, int]], hidden: int, name: str) -> tuple[int, int]:
    """Inputs of an MLP's last matrix, and outputs of its others together.

    Raises:
        NotImplementedError: If there are none.
    """
    mlp = [sizes for key, sizes in linears.items() if "att" not in key]  # attn, attention, self_attention
    back = [sizes for sizes in mlp if sizes[1] == hidden]
    if len(mlp) < 2 or not back:
        raise _unplanned("have an MLP in a layer", name, f"the matrices {list(linears)}")
    last = back[-1]
    return last[0], sum(o for _, o in mlp) - last[1]


def _decoder_layer(model: Any, name: str) -> nn.Module:
    """The first decoder layer, which stands for all.

    Raises:
        NotImplementedError: If it cannot, or is a mixture of experts.
    """
    layers = decoder_layers(model)
    if not layers:
        raise _unplanned("have a list of decoder layers", name, f"none in {type(model).__name__}")
    for layer in layers:
        for key, module in layer.named_modules():
            words = key.lower(), type(module).__name__.lower()
            if any("expert" in word for word in words) or words[1].endswith("moe"):
                gigabytes = 2e-9 * sum(weight.numel() for weight in stacked_experts(model).values())
                raise NotImplementedError(
                    f"`model` must be without experts, got {name}: bitsandbytes leaves stacked experts in 16 bit, here "
                    f"{gigabytes:.3g} GB of weights, and which tokens they get is not known beforehand. Try a short "
                    "run instead, where those fit."
                )
            if isinstance(module, nn.Conv1d):
                raise _unplanned("have layers of attention and an MLP alone", name, f"a convolution in {key}")
    if any(_linears(layer) != _linears(layers[0]) for layer in layers):
        raise _unplanned("have layers that are all alike", name, "layers of several kinds")
    return layers[0]


def _unplanned(rule: str, name: str, got: str) -> NotImplementedError:
    return NotImplementedError(f"`model` must {rule} to be planned, got {name} with {got}. Try a short run instead.")


# ---- what a layer keeps ----------------------------------------------------------------------------------------------


_ONE_AT_A_TIME = threading.RLock()
"""A run registers its attention under one name for all threads."""
_STAND_IN, _TOKENS = "qlora_dpo_plan", 64
"""Name of the attention that stands for ours in transformers' `AttentionInterface`, and tokens of a run."""


class _Keep(torch.autograd.Function):
    """An operation of ours, as far as memory goes: it keeps tensors and makes one."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *kept: Tensor) -> Tensor:
        """Zeros of a shape, in the dtype of what is kept."""
        ctx.save_for_backward(*kept)
        return kept[0].new_zeros(shape)


def _linear(module: Any, *parts: Tensor) -> Tensor:
    """A 4-bit layer with an adapter keeps what its input is made of; autocast narrows that."""
    rows = [part.reshape(-1, part.shape[-1]).to(module.weight.dtype) for part in parts]
    return _Keep.apply((*parts[0].shape[:-1], _sizes(module)[1]), *rows)  # type: ignore[index]


def _lean_mlp(module: Any, x: Tensor) -> Tensor:
    """A `lean` MLP keeps gate and up."""
    *first, down = (part for part in module.children() if _sizes(part))
    return _linear(down, *(_linear(part, x) for part in first))


def _lean_norm(module: Any, x: Tensor) -> Tensor:
    """A `lean` norm keeps its input."""
    return _Keep.apply(x.shape, x.reshape(-1, x.shape[-1]))


class _Run:
    """One run of a layer without data: what it keeps, and when it attends."""

    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self.sizes: list[Attention] = []
        self.kept: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.before = 0
        self.norms_behind = 0

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any) -> Any:
        """Attention that keeps what ours does: what is kept after it is gone when its backward pass begins."""
        heads, length, wide = query.shape[1], query.shape[2], value.shape[3]
        keys, values = (x.shape[1] * x.shape[3] for x in (key, value))
        plain = query.shape[3] == wide and named.get("softcap") is None and named.get("s_aux") is None
        if attention_mask is None:  # else it is not ours that attends
            self.sizes.append(Attention(heads, heads * query.shape[3], keys + values, heads * wide, plain))
        shape = 1, length, heads, wide
        kept = [x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for x in (query, key, value)]
        if not self.case.blockwise:
            copies = key.new_zeros(1, heads, length, key.shape[3]), value.new_zeros(1, heads, length, wide)
            kept = [query, *(torch.zeros_like(x) for x in copies * GATHERED), query.new_zeros(shape)]
        output = _Keep.apply(shape, *kept)
        self.outputs.append(output)
        self.before, self.norms_behind = len(self.kept), 0
        return output, None

    def note_norm(self, *args: Any) -> None:
        """Note that a norm runs."""
        self.norms_behind += 1

    def result(self, given: list[Tensor], state: Tensor, activation: int) -> Kept:
        """What was kept, beside what was given to the layer, of which `state` is its input."""
        size = self.bytes_of(self.kept, given)
        behind = self.bytes_of(self.kept[self.before :], [*given, *self.kept[: self.before], *self.outputs])
        waits = 0 if self.norms_behind else state.nbytes  # beside attention, the MLP's gradient waits
        whole = self.bytes_of([state], self.kept) == 0
        return Kept(size // _TOKENS, (behind - waits) // _TOKENS, activation // _TOKENS, whole)

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd keeps."""
        self.kept.append(tensor)
        return tensor

    def bytes_of(self, tensors: list[Tensor], but: list[Tensor]) -> int:
        """Of the storages, each once."""
        known = {tensor.untyped_storage()._cdata for tensor in but}
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for storage, size in found.items() if storage not in known)


class _Wide(TorchFunctionMode):
    """What autocast on a GPU computes in fp32, of what layers call; on a CPU it leaves these alone."""

    names = {"layer_norm", "pow", "rsqrt", "exp", "expm1", "log", "log1p", "softplus", "sum", "cumsum", "softmax"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Widen the 16-bit tensors among the arguments."""
        if getattr(func, "__name__", "").strip("_") in self.names:
            args = [widen(x) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Adds up the tensors that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add up."""
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes."""
        self.known = {key: (ref, size) for key, (ref, size) in self.known.items() if not ref.expired()}
        return sum(size for _, size in self.known.values())


def _steps(layer: nn.Module, x: Tensor) -> int:
    """What the backward pass of a layer's activation takes beside two gradients of the size of its input."""
    most = 0
    for module in layer.modules():
        if "activation" in type(module).__module__:
            with _Alive() as alive:
                total = (module(x.clone().requires_grad_()) * 2).sum()  # whose gradient goes once it is used
                before, alive.most = alive.now, 0
                total.backward()
            most = max(most, alive.most - before - 2 * x.nbytes)
    return most


class _ArrivedError(Exception):
    """The decoder came to its first layer."""


def _layer_inputs(decoder: Any, layer: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """What the decoder hands to its first layer, without data. Rotary embeddings must not look at their positions."""

    def stop(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        found.extend([list(args), named])
        raise _ArrivedError

    for module in decoder.modules():
        if "rotary" in type(module).__name__.lower():
            module.forward = functools.partial(inspect.unwrap(type(module).forward), module)
    found: list[Any] = []
    embeddings = decoder.get_input_embeddings().weight
    rows = embeddings.new_zeros(1, _TOKENS, embeddings.shape[1])
    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_ArrivedError):
            decoder(inputs_embeds=rows, use_cache=False)
    finally:
        hook.remove()
    return found[0], found[1]


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        return [values]
    values = list(values.values()) if isinstance(values, dict) else values
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _stand_ins(layer: nn.Module, lean_mlp: bool) -> None:
    """Let a layer keep what it does with our linear layers, norms and MLPs; nothing watches it yet."""
    for module in layer.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        own: Any = None
        if _sizes(module):
            own = _linear
        elif norm_rule(module):
            own = _lean_norm
        elif lean_mlp and is_gated_mlp(module):
            own = _lean_mlp
        if own is not None:
            module.forward = functools.partial(own, module)
        else:
            module.__dict__.pop("forward", None)


def _run_case(decoder: Any, layer: nn.Module, case: LayerCase, inner: int) -> tuple[list[Attention], Kept]:
    """Run the layer once; sizes of attention for each time that it attends."""
    run = _Run(case)
    AttentionInterface.register(_STAND_IN, run.attend)
    with attention_backend(decoder.config, _STAND_IN):
        args, named = _layer_inputs(decoder.to(torch.bfloat16 if case.width == 2 else torch.float32), layer)
        _stand_ins(layer, case.lean_mlp)
        state = (args or list(named.values()))[0].requires_grad_()
        if state.dim() != 3:
            raise NotImplementedError(f"a layer's input has {state.dim()} dimensions")
        for module in _norms(layer):
            module.register_forward_pre_hook(run.note_norm)
        with _Wide() if case.width == 2 and not case.blockwise else contextlib.nullcontext():
            with saved_tensors_hooks(run.keep, lambda tensor: tensor):
                layer(*args, **named)
            given = [*layer.parameters(), *_tensors([args, named])]
            activation = _steps(layer, state.new_zeros(_TOKENS, inner))
    return run.sizes, run.result(given, state, activation)


def _run_layer(model: Any, layer: nn.Module, name: str, inner: int) -> tuple[Attention, dict[LayerCase, Kept]]:
    """Sizes of a layer's attention, and what the layer keeps in each case.

    Raises:
        NotImplementedError: If the layer does not run so, or does not attend once as transformers' interface has it.
    """
    decoder, found = model.get_decoder(), {}
    try:
        for case in itertools.starmap(LayerCase, itertools.product((4, 2), (True, False), (True, False))):
            sizes, found[case] = _run_case(decoder, layer, case, inner)
    except Exception as error:  # a model's own code, which may do what cannot be done without data
        raise _unplanned("have layers that run without data, on one state a token,", name, _reason(error)) from error
    if len(sizes) != 1:
        raise _unplanned("attend once in a layer, by transformers' interface,", name, f"{len(sizes)} times")
    return sizes[0], found
