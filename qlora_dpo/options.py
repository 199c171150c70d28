"""The options of `qlora-dpo train` for data and model, and the policy made from them."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.footprint import DTYPES, MemoryOptions
from qlora_dpo.model import default_quantization, device_map, load_policy
from qlora_dpo.paths import adapter_folder
from qlora_dpo.typed import help_of

QUANT_TYPES = ("nf4", "fp4")
STORAGE_DTYPES = ("uint8", *DTYPES)


@dataclass
class DataArguments:
    """Which rows to use."""

    dataset_name: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .parquet or .csv file or a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as 'train[:250]' are understood."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, such as 'test' or 'train[250:]'. None: no evaluation."}
    )


@dataclass
class ModelArguments:
    """Which model to train, and how its adapter is made."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the base model, or folder of an adapter to go on with."}
    )
    new_adapter: bool = field(
        default=False, metadata={"help": "Train a new adapter on top of the one named, which stays frozen."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of unquantised weights and of 4-bit compute: bfloat16, float16 or float32. Default: 16 bit. "
            "On a CPU without bf16 instructions float32, with --bf16 false, is about three times as fast."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the model outside the tree and packed layouts."}
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "Load the base in 4 bit; --no_load_in_4bit for 16 bit."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit type: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=True, metadata=help_of(MemoryOptions, "use_bnb_nested_quant"))
    bnb_4bit_quant_storage: str = field(
        default="uint8",
        metadata={
            "help": "Dtype that holds the 4-bit weights: uint8, or for FSDP2, which shares out floats, bfloat16."
        },
    )
    quantize_head: bool = field(default=False, metadata=help_of(MemoryOptions, "quantize_head"))
    embeddings_on_cpu: bool = field(default=False, metadata=help_of(MemoryOptions, "embeddings_on_cpu"))
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Adapter scale times rank."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapter; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt. Default: all-linear, without the head."}
    )


def _lora(model: ModelArguments, args: QLoRADPOConfig) -> LoraConfig | None:
    """The adapter that options ask for; None for one that is there already.

    Raises:
        ValueError: For options that cannot go together.
    """
    if model.lora_dropout and args.disable_dropout:
        raise ValueError(
            f"`lora_dropout` must be 0 while `disable_dropout` is on, got {model.lora_dropout}. Add "
            "--disable_dropout false."
        )
    targets = model.lora_target_modules or ["all-linear"]
    if "all-linear" in targets and len(targets) > 1:
        raise ValueError(
            f"`lora_target_modules` must be all-linear alone or names of layers, got {' '.join(targets)}. all-linear "
            "leaves the head out: name every layer to adapt it too."
        )
    on_adapter = adapter_folder(model.model_name_or_path)
    if model.new_adapter and not on_adapter:
        raise ValueError(
            f"`new_adapter` must be False for {model.model_name_or_path}, which is no adapter and gets a new one "
            "anyway, got True. Leave it out."
        )
    if on_adapter and not model.new_adapter:
        changed = [f.name for f in fields(model) if f.name.startswith("lora_") and getattr(model, f.name) != f.default]
        if changed:
            raise ValueError(
                f"`{changed[0]}` must be left out for {model.model_name_or_path}, an adapter that has its own, got "
                f"{getattr(model, changed[0])}. Add --new_adapter true to train a new one on top of it."
            )
        return None
    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,  # in a list it would be a layer's name
        task_type="CAUSAL_LM",
    )


def _quantization(model: ModelArguments, on_cpu: bool) -> BitsAndBytesConfig | None:
    """How options ask the base to be quantised; None for not at all.

    Raises:
        ValueError: For options that are none of what there is, or that nothing uses.
    """
    names = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    if not model.load_in_4bit:
        for name in names:
            value, default = getattr(model, name), ModelArguments.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(f"`{name}` must be {default} without `load_in_4bit`, got {value}. Leave it out.")
        return None
    for name, choices in (("bnb_4bit_quant_type", QUANT_TYPES), ("bnb_4bit_quant_storage", STORAGE_DTYPES)):
        if getattr(model, name) not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(model, name)}. Use {choices[0]}.")
    found = default_quantization(on_cpu)
    found.bnb_4bit_quant_type = model.bnb_4bit_quant_type
    found.bnb_4bit_use_double_quant = model.use_bnb_nested_quant
    found.bnb_4bit_quant_storage = getattr(torch, model.bnb_4bit_quant_storage)
    return found


def chosen_policy(model: ModelArguments, args: QLoRADPOConfig) -> PeftModel:
    """The policy that options ask for; `args.model_init_kwargs` are used up.

    Raises:
        ValueError: For options that cannot go together, or are none of what there is.
    """
    lora, quantization = _lora(model, args), _quantization(model, args.use_cpu)
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        "device_map": device_map(args.use_cpu),
    }
    if model.dtype is not None:
        if model.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {model.dtype}. Use bfloat16.")
        options["dtype"] = getattr(torch, model.dtype)
        if quantization is not None:
            quantization.bnb_4bit_compute_dtype = options["dtype"]
    options |= args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if "quantization_config" in options:
        raise ValueError(
            "`model_init_kwargs` must be without `quantization_config` at the command line, got one. Use "
            "--load_in_4bit and --bnb_4bit_quant_type."
        )
    args.model_init_kwargs = None  # they are used here
    return load_policy(
        model.model_name_or_path,
        peft_config=lora,
        quantize=model.load_in_4bit,
        quantization_config=quantization,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        quantize_head=model.quantize_head,
        embeddings_on_cpu=model.embeddings_on_cpu,
        **{name: value for name, value in options.items() if value is not None},
    )
