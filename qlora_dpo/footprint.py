"""What a training holds in memory, counted in bytes by part from a model's sizes and the options alone.

There is what is held all the time, and for each phase of a step the tensors that are alive at its fullest moment. Each
count follows the code that makes the tensors (`logps`, `lora`, `attention`, transformers' layers) and says so.

Legend: T unique tokens of a forward, N scored tokens, h hidden size, q all query heads of a token, I intermediate size,
V vocabulary, L layers, c bytes of a number in the compute dtype.
"""

import math
from dataclasses import dataclass, field

import torch

from qlora_dpo.blockwise import MOST_QUERIES, MOST_WEIGHTS
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.four_bit_head import tile_shape
from qlora_dpo.lean import strip_rows
from qlora_dpo.logits import chunk_length, strip_length
from qlora_dpo.typed import help_of

DTYPES = ("bfloat16", "float16", "float32")
"""Of weights that are not quantised, and of what is computed with them."""

FP32 = 4

DEVICE_CONTEXT = 2**30
"""Bytes that a process takes on a GPU beside its tensors: CUDA's context and kernels, workspaces of cuBLAS, and what
the caching allocator rounds up. An assumption, not a measurement: `device_context_bytes` takes your own."""

GATHERED = 2
"""Copies of the row's keys and values, as wide as the queries, that attention keeps beside the rotated queries.

They are repeated to the query heads, and gathered by segment (a completion's own behind its prompt's). The second copy
is as long as the prompt and all completions but the first; it is taken as the whole row. Attention with soft-capped
scores (Gemma 2) is linear in T only by FlexAttention. On a CPU `blockwise` keeps neither: keys and values stay as the
model made them.
"""

TO_HOST = ("embeddings_on_cpu", "activation_offloading")
"""Options that move something to CPU memory, where a training on a CPU has it already."""

OPTIMIZERS = {
    "adamw_torch": 32,
    "adamw_torch_fused": 32,
    "paged_adamw_32bit": 32,
    "adamw_8bit": 8,
    "adamw_bnb_8bit": 8,
    "paged_adamw_8bit": 8,
}
"""Bits of each of Adam's two moments, by the names that `optim` has in transformers."""


# ---- sizes of a model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCase:
    """What decides how much a layer keeps.

    Attributes:
        width: Bytes of a number in the compute dtype.
        blockwise: Whether attention is `blockwise`, which keeps keys and values as the model made them.
        lean_mlp: Whether gated MLPs keep gate and up only.
    """

    width: int
    blockwise: bool
    lean_mlp: bool


@dataclass(frozen=True)
class Kept:
    """What a layer keeps for its backward pass, in bytes for each token.

    Attributes:
        size: All of it, but for the layer's input and the projections of adapters.
        behind: What of it is gone when the backward pass comes to attention.
        activation: What the backward pass of the MLP's activation takes on top: beside two gradients, steps of several.
        input: Whether the layer's input is kept as it came.
    """

    size: int
    behind: int
    activation: int
    input: bool


@dataclass(frozen=True)
class Attention:
    """Sizes of attention, in numbers for each token.

    Attributes:
        heads: Query heads.
        query: All query heads together.
        key_value: All key and value heads together.
        output: What comes out of all heads.
        plain: Whether values are of the size of keys, and scores neither soft-capped nor with sinks.
    """

    heads: int
    query: int
    key_value: int
    output: int
    plain: bool

    @property
    def head_dim(self) -> int:
        """One query head."""
        return self.query // self.heads


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM, in elements.

    Attributes:
        name: What the user called it.
        hidden: Size of a hidden state.
        layers: Decoder layers.
        attention: Sizes of a layer's attention.
        intermediate: Input of the MLP's last matrix.
        expanded: Outputs of the MLP's other matrices together: twice `intermediate` where it is gated.
        vocabulary: Rows of the LM head.
        softcap: Whether the logits are soft-capped.
        hidden_norms: Norms of a hidden state in a layer.
        lean_norms: Whether the norms are such that `lean` has them keep their input as it comes.
        lean_mlp: Whether the MLP is one that `lean` has keep gate and up only.
        kept: What a layer keeps, case by case.
        linears: `(inputs, outputs)` of each linear layer but the head.
        adapted: The same of those that text goes through, and the default adapter changes.
        layer_linears: The same of one decoder layer.
        embeddings: Weights of the embeddings.
        head: Weights of the LM head that are not the embeddings: 0 if it is tied to them.
        other: All other weights: norms, biases.
    """

    name: str
    hidden: int
    layers: int
    attention: Attention
    intermediate: int
    expanded: int
    vocabulary: int
    softcap: bool
    hidden_norms: int
    lean_norms: bool
    lean_mlp: bool
    kept: dict[LayerCase, Kept]
    linears: tuple[tuple[int, int], ...]
    adapted: tuple[tuple[int, int], ...]
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


# ---- options ---------------------------------------------------------------------------------------------------------


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class MemoryOptions:
    """What decides memory beside the model: keywords of `plan_memory` and options of `qlora-dpo plan`."""

    tokens: int = field(
        default=2048,
        metadata=_help("Unique tokens of a forward: max_tokens_per_forward, or those of the largest batch."),
    )
    scored_tokens: int | None = field(
        default=None, metadata=_help("How many of them are scored, those of completions. None: all.")
    )
    lora_r: int = field(default=16, metadata=_help("Rank of the adapter on every linear layer but the head."))
    gradient_checkpointing: bool = field(default=True, metadata=help_of(QLoRADPOConfig, "gradient_checkpointing"))
    keep_layers: int = field(
        default=0, metadata=_help("Layers, the last ones, whose activations are kept all the same.")
    )
    quantize: bool = field(default=True, metadata=_help("Base in 4 bit; False for the compute dtype."))
    use_bnb_nested_quant: bool = field(default=True, metadata=_help("Quantise the quantisation constants too."))
    dtype: str = field(
        default="bfloat16",
        metadata=_help("bfloat16, float16 or float32; also of weights that are not quantised."),
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata=_help(
            f"As in transformers, one of {', '.join(OPTIMIZERS)}. Paged state is counted as if it were on the GPU."
        ),
    )
    activation_offloading: bool = field(default=False, metadata=help_of(QLoRADPOConfig, "activation_offloading"))
    quantize_head: bool = field(
        default=False, metadata=_help("Load the head in 4 bit too, where it is not tied to the embeddings.")
    )
    embeddings_on_cpu: bool = field(
        default=False,
        metadata=_help("Keep input embeddings in CPU memory, where they are neither tied to the head nor trained."),
    )
    precompute_ref_log_probs: bool = field(default=False, metadata=help_of(QLoRADPOConfig, "precompute_ref_log_probs"))
    logps_chunk_size: int | None = field(default=None, metadata=help_of(QLoRADPOConfig, "logps_chunk_size"))
    device: str = field(
        default="cuda", metadata=_help("cuda or cpu: what attention keeps for the backward pass depends on it.")
    )
    device_context_bytes: int = field(
        default=DEVICE_CONTEXT, metadata=_help("What the process takes on the GPU beside its tensors: an assumption.")
    )

    def __post_init__(self) -> None:
        for name in ("tokens", "scored_tokens", "lora_r", "logps_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}. Leave it out for its default.")
        for name in ("keep_layers", "device_context_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must be 0 or more, got {getattr(self, name)}. Leave it out for its default."
                )
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {self.dtype}. Use bfloat16.")
        self._check_device()
        if self.keep_layers and not self.gradient_checkpointing:
            raise ValueError(
                f"`keep_layers` must be 0 without `gradient_checkpointing`, where every layer is kept, got "
                f"{self.keep_layers}. Leave it out."
            )
        if self.quantize_head and not self.quantize:
            raise ValueError("`quantize_head` must be False for a base that is not in 4 bit, got True. Leave it out.")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"`optim` must be one of {sorted(OPTIMIZERS)}, got {self.optim}. Use adamw_torch_fused.")

    def _check_device(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"`device` must be cuda or cpu, got {self.device}. Use cuda for any GPU.")
        for name in TO_HOST:
            if self.device == "cpu" and getattr(self, name):
                raise ValueError(f"`{name}` must be False on a CPU, which has all in its memory, got True. Drop it.")

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype, which unquantised weights have too."""
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def scored(self) -> int:
        """Scored tokens; at most all of them are."""
        return min(self.scored_tokens or self.tokens, self.tokens)


# ---- what is held all the time ---------------------------------------------------------------------------------------


def held(shape: Shape, options: MemoryOptions) -> dict[str, int]:
    """Bytes that are there in every phase, by part."""
    in_4bit = shape.linears if options.quantize else ()
    wide = shape.other + (0 if options.quantize else sum(i * o for i, o in shape.linears))
    if options.quantize_head:
        in_4bit = (*in_4bit, (shape.hidden, shape.vocabulary))
    adapters = FP32 * sum(_adapter_sizes(shape, options.lora_r))
    parts = {
        "4-bit weights": sum(math.ceil(i * o / 2) for i, o in in_4bit),
        "quantisation constants": sum(_constants(i * o, options.use_bnb_nested_quant) for i, o in in_4bit),
        "embeddings": 0 if options.embeddings_on_cpu else shape.embeddings * options.width,
        "LM head": 0 if options.quantize_head else shape.head * options.width,
        "other weights": wide * options.width,
        "adapters": adapters,
        "gradients": adapters,  # there from the second micro-batch of a step on, whole
        "optimizer state": _optimizer_state(shape, options),
        "device context": options.device_context_bytes,
    }
    return {name: size for name, size in parts.items() if size}


def _constants(weights: int, double: bool) -> int:
    """A number per block of 64 weights; doubly quantised 8 bits of it, with a number per 256 of them and an offset."""
    blocks = math.ceil(weights / 64)
    code = 16 * FP32
    return code + (blocks + FP32 * math.ceil(blocks / 256) + FP32 if double else FP32 * blocks)


def _adapter_sizes(shape: Shape, rank: int) -> list[int]:
    """Elements of each A `(r, inputs)` and B `(outputs, r)`."""
    return [rank * size for linear in shape.adapted for size in linear]


def _optimizer_state(shape: Shape, options: MemoryOptions) -> int:
    """Two moments; in 8 bit with an fp32 number per 256, but for tensors below 4,096 elements, which stay in fp32."""
    sizes = _adapter_sizes(shape, options.lora_r)
    if OPTIMIZERS[options.optim] == 32:
        return sum(2 * FP32 * n for n in sizes)
    return sum(2 * FP32 * n if n < 4096 else 2 * (n + FP32 * math.ceil(n / 256)) for n in sizes)


# ---- what a phase holds on top ---------------------------------------------------------------------------------------


def _layer_saved(shape: Shape, options: MemoryOptions) -> int:
    """Bytes that one layer keeps for its backward pass, beside its input: the working set of a recomputed layer.

    What a run of the layer without data kept for each token, and the projections of rank r.
    """
    c = options.width
    numbers = options.lora_r * len(shape.layer_linears)
    factors = sum(options.lora_r * (i + o) for i, o in shape.layer_linears) if c < FP32 else 0  # autocast's copies
    if not options.quantize and c < FP32:  # PEFT's own layer: autocast narrows the input of each adapter anew
        numbers += sum(i for i, _ in shape.layer_linears)
    return options.tokens * (numbers * c + _layer_kept(shape, options).size) + factors * c


def _layer_kept(shape: Shape, options: MemoryOptions) -> Kept:
    return shape.kept[LayerCase(options.width, _attends_blockwise(options), _lean_mlp(shape, options))]


def _attends_blockwise(options: MemoryOptions) -> bool:
    return options.device == "cpu" and options.dtype != "float16"


def _attention_work(shape: Shape, options: MemoryOptions) -> int:
    """Bytes that attention's backward pass takes beside what was kept for it.

    The gradients of its output and of the queries; those of the keys and values, repeated and gathered as these are.
    `blockwise` has queries and the output's gradient once more, keys and values three times in all, their gradients
    twice, in fp32 the second time, and a block's weights and their gradients.
    """
    size = shape.attention
    if not _attends_blockwise(options):
        return options.tokens * (1 + GATHERED) * (size.query + size.output) * options.width
    numbers = options.tokens * (2 * size.query + 2 * size.output + 3 * size.key_value)
    sums = options.tokens * size.key_value * FP32
    return (numbers + 2 * _block_weights(shape, options)) * options.width + sums


def _block_weights(shape: Shape, options: MemoryOptions) -> int:
    """Weights of the largest block of `blockwise`, of all heads."""
    return min(MOST_WEIGHTS, shape.attention.heads * min(MOST_QUERIES, options.tokens) * options.tokens)


def _lean_mlp(shape: Shape, options: MemoryOptions) -> bool:
    """Whether the MLP keeps gate and up only: what `lean` does over 4-bit layers."""
    return shape.lean_mlp and options.quantize


def _norm_width(shape: Shape, options: MemoryOptions) -> int:
    """Bytes of a number that a norm keeps."""
    return options.width if shape.lean_norms else FP32


def _kept(shape: Shape, options: MemoryOptions) -> dict[str, int]:
    """Activations that a forward leaves for its backward pass."""
    state = options.tokens * shape.hidden * options.width
    positions = 2 * options.tokens * shape.attention.head_dim * options.width  # cosines and sines, shared by all layers
    if options.activation_offloading:  # one input that was brought back or is on its way out, and what is too small
        small = 0 if options.gradient_checkpointing else shape.layers * options.lora_r * len(shape.layer_linears)
        return {"layer inputs": state + positions, "projections": options.tokens * small * options.width}
    layers = min(options.keep_layers, shape.layers) if options.gradient_checkpointing else shape.layers
    states = shape.layers - layers * (not _layer_kept(shape, options).input)  # else norms hold fp32 copies instead
    return {"layer inputs": states * state + positions, "kept layers": layers * _layer_saved(shape, options)}


def _largest_weight(shape: Shape, options: MemoryOptions) -> int:
    """The 4-bit matrix that is dequantised for a product, if any is."""
    return shape.largest_linear * options.width if options.quantize else 0


def _reference_layer(shape: Shape, options: MemoryOptions) -> dict[str, int]:
    """The reference in a layer, without graph: hidden states, and the MLP or, on a CPU, attention.

    The caller's frames hold the embedded tokens and the layer's input, beside its middle and the norm of that. In the
    MLP either activation, up and product are there (one less without a gate), or what goes into a linear layer, what
    comes out of it and its dequantised weight. In `blockwise` there are queries, keys, values and output, keys in fp32
    and values once more, and a block's scores in fp32 and weights.
    """
    c, t = options.width, options.tokens
    inner = t * shape.intermediate * c
    gated = shape.expanded > shape.intermediate
    weight = _largest_weight(shape, options)
    moments = [{"MLP": max((2 + gated) * inner, (1 + gated) * inner + weight)}]
    if _attends_blockwise(options):
        size = shape.attention
        rows = t * ((size.query + size.output) * c + size.key_value * (3 * c + FP32) // 2)
        moments.append({"attention": rows + _block_weights(shape, options) * (FP32 + c * (c < FP32))})
    fullest = max(moments, key=_total)
    return {"hidden states": t * (4 * shape.hidden + 2 * shape.attention.head_dim) * c} | fullest


def _head(shape: Shape, options: MemoryOptions, trained: bool) -> dict[str, int]:
    """The LM head: last hidden states, those at scored positions, their unit gradient, and tiles of logits.

    In 4 bit the head is dequantised a piece of the vocabulary at a time, and the unit gradient is a sum in fp32 first.
    """
    c, packed = options.width, options.quantize_head
    states = options.tokens * shape.hidden * c
    rows = options.scored * shape.hidden
    keeps = trained and not options.activation_offloading
    before_norm = options.tokens * shape.hidden * _norm_width(shape, options) * keeps  # for its backward pass
    vocabulary, chunk = shape.vocabulary, chunk_length(shape.vocabulary, options.logps_chunk_size, c)
    if packed:
        chunk, vocabulary = tile_shape(shape.hidden, shape.vocabulary, options.logps_chunk_size, c)
    chunk = min(chunk, options.scored)
    # In fp32, of a strip: the logits (unless the tile is), as they are capped, and for the entropy their exponentials.
    strips = FP32 * vocabulary * min(strip_length(vocabulary, options.device), chunk)
    return {
        "last hidden states": states + before_norm,
        "scored hidden states": rows * c,
        "unit gradient": (rows + chunk * shape.hidden) * (c + FP32 * packed) * trained,
        "logit tiles": vocabulary * chunk * c,
        "logit strips": strips * ((2 if shape.softcap else 1 - (c == FP32)) + trained),
        "dequantised head": (vocabulary * shape.hidden * c + shape.vocabulary * shape.hidden // 64 * FP32) * packed,
    }


def _backward(shape: Shape, options: MemoryOptions) -> dict[str, int]:
    """The backward pass of the last layer, when all layer inputs are still there.

    On top of its working set (with offloading and without checkpointing only of what the MLP needs at the moment) there
    is the gradient of its output, and at the fullest of these moments:

    - in the MLP, the gradients of the product (which is gone), of activation and of up; without a gate, of one less;
      more within an activation of several operations; a `lean` one has those of gate and up, and of a strip the
      activation and two gradients;
    - in the MLP's last matrix, the gradient of the product and the dequantised weight;
    - where a norm that is not `lean`'s follows the MLP (as in Gemma), its four gradients in fp32;
    - in attention, when what the MLP and the norm before it kept is gone.
    """
    t = options.tokens
    inner = t * shape.intermediate * options.width
    gated = shape.expanded > shape.intermediate
    if options.activation_offloading and not options.gradient_checkpointing:
        work = inner * (1 + gated if _lean_mlp(shape, options) else 2 + gated)
    elif options.gradient_checkpointing and (options.activation_offloading or not options.keep_layers):
        work = _layer_saved(shape, options)
    else:
        work = 0  # the last layer is among those kept
    row = shape.intermediate * options.width
    strips = 3 * row * min(strip_rows(row, options.device), t) * _lean_mlp(shape, options)
    steps = t * _layer_kept(shape, options).activation
    moments = [
        {"gradients of activations": inner * (1 + gated) + (strips or steps)},
        {"gradients of activations": inner, "dequantised weight": _largest_weight(shape, options)},
        {"gradients of activations": 4 * FP32 * t * shape.hidden * (shape.hidden_norms > 2 and not shape.lean_norms)},
        {"gradients of activations": _attention_work(shape, options) - t * _layer_kept(shape, options).behind},
    ]
    return {
        **_kept(shape, options),
        "layer at work": work,
        "gradient of its output": t * shape.hidden * options.width,
        **max(moments, key=_total),
    }


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def phases(shape: Shape, options: MemoryOptions) -> dict[str, dict[str, int]]:
    """What each phase of a step holds at its fullest, by part, in the order of the step."""
    reference = max(_reference_layer(shape, options), _head(shape, options, trained=False), key=_total)
    copies = FP32 * sum(_adapter_sizes(shape, options.lora_r)) if options.optim == "adamw_torch" else 0
    found = {
        "reference": {} if options.precompute_ref_log_probs else reference,
        "policy and head": _kept(shape, options) | _head(shape, options, trained=True),
        "backward": _backward(shape, options),
        "optimizer": {"square roots of all moments": copies},
    }
    return {phase: {name: size for name, size in parts.items() if size} for phase, parts in found.items()}
