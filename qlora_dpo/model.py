"""Loading: a 4-bit base with LoRA adapters attached, ready to train."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_dpo.adapters import (
    free_name,
    loading_changes_base,
    stack_adapter,
    stacked_experts,
    train_in_fp32,
    trained_adapters,
    without_unfit_layers,
)
from qlora_dpo.config import best_precision
from qlora_dpo.errors import FixableError, memory_said
from qlora_dpo.offload import keep_embeddings_on_cpu, require_frozen_embeddings
from qlora_dpo.origins import base_commit
from qlora_dpo.paths import (
    RECORD_NAME,
    TOKENIZER_FILES,
    UNKNOWN,
    adapter_folder,
    at_revision,
    base_of,
    check_path,
    lasting,
    local_adapter,
    saved_adapter,
    with_revision,
)
from qlora_dpo.recompute import checkpoint_activations
from qlora_dpo.weights import (
    fit_vocabulary,
    load_adapter_weights,
    require_same_rows,
    require_same_vocabulary,
    shapes_checked_later,
)


def compute_dtype(on_cpu: bool = False) -> torch.dtype:
    """bf16, or fp16 on a GPU without bf16."""
    return torch.float16 if not on_cpu and best_precision() == "fp16" else torch.bfloat16


def default_quantization(on_cpu: bool = False) -> BitsAndBytesConfig:
    """NF4 with double quantisation and 16-bit compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(on_cpu),
    )


def default_lora() -> LoraConfig:
    """LoRA of rank 16 on every linear layer but the head.

    PEFT counts routers and stacked experts of a mixture among them (`target_parameters` in the saved config).
    """
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def keep_one_arithmetic(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from changing their arithmetic when they first run in eval mode.

    bitsandbytes repacks the weight of a layer that runs in eval mode on a CPU with AVX512-BF16, for good: from then on
    it computes in another arithmetic and has no backward pass, so training after one `evaluate()` or `generate()` goes
    on with wrong gradients and no error. Switched off per layer; without effect on a GPU.

    Raises:
        FixableError: If a layer has run so already: packed, its scales are rounded, so that its base is another one.
    """
    packed = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            packed += bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))
    if packed:
        raise FixableError(
            f"A 4-bit model must not have run on a CPU in eval mode before it is handed in, got {packed} layers that "
            "bitsandbytes has repacked for inference, with rounded scales and no right gradient. Load it anew, and "
            "evaluate or generate once the trainer has it, or load it with load_policy."
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether the model's weights are in 4 or 8 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def device_map(on_cpu: bool = False) -> dict[str, Any]:
    """The whole model on this process's device; in CPU memory where there is no other, or if asked to."""
    if on_cpu or not torch.accelerator.is_available():
        return {"": "cpu"}
    return {"": int(os.environ.get("LOCAL_RANK", 0))}


def load_base(
    model_id: str,
    quantization_config: Any = None,
    quantize: bool = True,
    *,
    quantize_head: bool = False,
    embeddings_on_cpu: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal LM without adapters: in NF4 unless told otherwise, the rest of its weights in 16 bit.

    Args:
        model_id: Hub id, perhaps as `id@revision`, or folder.
        quantization_config: How to quantise; None for `default_quantization()`.
        quantize: False to load the weights as they are.
        quantize_head: Whether the head is in 4 bit too; transformers leaves it in 16 bit.
        embeddings_on_cpu: Whether the input embeddings stay in CPU memory, and only looked-up rows go to the device.
        **kwargs: Passed to `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).

    Returns:
        The model, `use_cache` off.

    Raises:
        ValueError: For a quantisation beside `quantize=False`; for a 4-bit head, or embeddings in CPU memory, where the
            head is the embeddings.
        OutOfMemoryError: If it does not fit.
    """
    if not quantize and quantization_config is not None:
        raise ValueError("`quantize` must be True with a `quantization_config`, got False and one. Drop one of them.")
    kwargs.setdefault("device_map", device_map())
    on_cpu = kwargs["device_map"] == device_map(on_cpu=True)
    if quantize and quantization_config is None and "quantization_config" not in kwargs:
        quantization_config = default_quantization(on_cpu)
    if quantize_head:
        quantization_config = _with_head(quantization_config)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if "torch_dtype" in kwargs:  # the older name
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    kwargs.setdefault("dtype", compute_dtype(on_cpu))
    name, kwargs = with_revision(model_id, kwargs)
    with at_revision("model", name, kwargs.get("revision")), memory_said(*_AT_LOADING):
        model = AutoModelForCausalLM.from_pretrained(lasting(name), **kwargs)  # the adapter's config will name it
    model.config.use_cache = False
    model.commit = base_commit(name, kwargs.get("revision"))
    keep_one_arithmetic(model)
    if quantize:
        _warn_of_experts(model)
    head = model.get_output_embeddings()
    if hasattr(head, "compute_dtype") and head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            "A 4-bit head must not be tied to the embeddings, which stay in 16 bit, got one that is. Leave out "
            "`quantize_head`, or name the head in llm_int8_skip_modules."
        )
    if quantize_head and not isinstance(head, Linear4bit):
        raise ValueError(
            f"`quantize_head` must be False for a head that stays as it is, got {type(head).__name__}. Take it out of "
            "llm_int8_skip_modules, or load weights that are not quantised yet."
        )
    if embeddings_on_cpu:
        keep_embeddings_on_cpu(model)
    return model


_AT_LOADING = (
    "while the base was loaded",
    "Free the device's memory, or name a smaller base; `qlora-dpo plan` says what fits before anything is downloaded.",
)


def _warn_of_experts(model: PreTrainedModel) -> None:
    """Warn if most of a base that was to be in 4 bit is not."""
    experts = sum(weight.nbytes for weight in stacked_experts(model).values())
    whole = sum(weight.nbytes for weight in model.parameters())
    if 2 * experts > whole:
        warnings.warn(
            f"A base in 4 bit should have no stacked experts, got {experts / 1e9:.3g} of its {whole / 1e9:.3g} GB in "
            "such, which bitsandbytes leaves in 16 bit. Nothing is wrong but the size; a dense base is smaller.",
            stacklevel=3,
        )


def _with_head(quantization: Any) -> BitsAndBytesConfig:
    """The quantisation with the head in 4 bit: transformers skips it unless a list says what to skip.

    Raises:
        ValueError: If the base is not loaded in 4 bit.
    """
    if not getattr(quantization, "load_in_4bit", False):
        raise ValueError("`quantize_head` must be False for a base that is not in 4 bit, got True. Leave it out.")
    changed = copy.deepcopy(quantization)
    changed.llm_int8_skip_modules = changed.llm_int8_skip_modules or []
    return changed


def attach_adapter(
    model: PreTrainedModel, peft_config: PeftConfig | None = None, revision: str | None = None
) -> PeftModel:
    """A new adapter on a base; its weights in fp32 whatever the base's dtype.

    `revision` is that of the base, which the adapter's config keeps.

    Raises:
        ValueError: If the model has an adapter already.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model must have no adapter yet, got one that transformers loaded. Load the base alone.")
    config = without_unfit_layers(peft_config or default_lora(), model)
    policy = get_peft_model(model, config, revision=revision)
    train_in_fp32(policy)
    return policy


def load_policy(
    model_id: str,
    *,
    peft_config: PeftConfig | None = None,
    adapter: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    quantize: bool = True,
    gradient_checkpointing: bool = True,
    quantize_head: bool = False,
    embeddings_on_cpu: bool = False,
    **model_kwargs: Any,
) -> PeftModel:
    """A 4-bit base with LoRA adapters attached, ready to train.

    Args:
        model_id: Hub id, perhaps as `id@revision`, or folder of the base model, or of an adapter (its base is then
            looked up).
        peft_config: The new adapter; None for LoRA of rank 16 on every linear layer but the head. With `adapter`, it is
            stacked on that one, which is frozen.
        adapter: The same of a trained adapter to load: to go on with, or to stack `peft_config` on. What it was
            itself stacked on, as its `qlora_dpo.json` says, is loaded below it.
        quantization_config: How to quantise the base; None for NF4 with double quantisation and 16-bit compute.
        quantize: False to keep the base in 16 bit.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        quantize_head: Whether the head is in 4 bit too, which must not be tied to the embeddings.
        embeddings_on_cpu: Whether the input embeddings stay in CPU memory, and only the rows that a batch looks up go
            to the device; they must be neither tied to the head nor trained.
        **model_kwargs: Passed to `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).

    Returns:
        The policy: adapters in fp32 and trainable, everything else frozen.

    Raises:
        FileNotFoundError: If a local path is not there.
        ValueError: If `model_id` is an adapter beside `adapter`, an adapter to stack on changes the base, or the head
            or the embeddings cannot be as asked.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """
    token = model_kwargs.get("token")
    if Path(model_id).expanduser().is_dir():
        model_id = saved_adapter(model_id)
    if adapter_folder(model_id, token):
        if adapter is not None:
            raise ValueError(
                f"`model_id` must be a base model where `adapter` is given, got the adapter {model_id}. Name its base; "
                "to train on top of an adapter, pass it as `adapter`, with a `peft_config`."
            )
        adapter, model_id = model_id, base_of(model_id, token)
    model_id, model_kwargs = with_revision(model_id, model_kwargs)
    if adapter is not None and "revision" not in model_kwargs:
        revision = PeftConfig.from_pretrained(local_adapter(adapter, token)).revision
        model_kwargs |= {"revision": revision} if revision else {}
    where = {"quantize_head": quantize_head, "embeddings_on_cpu": embeddings_on_cpu}
    base = load_base(model_id, quantization_config, quantize, **where, **model_kwargs)
    if adapter is None:
        policy = attach_adapter(base, peft_config, model_kwargs.get("revision"))
    else:
        policy = _with_trained(base, check_path(adapter, "adapter"), peft_config, token)
        warn_of_another_quantization(adapter, base, token)
        for config in policy.peft_config.values():
            config.revision = model_kwargs.get("revision")
    require_frozen_embeddings(policy)
    if gradient_checkpointing:
        checkpoint_activations(policy)
    return policy


def _with_trained(
    base: PreTrainedModel, adapter: str, peft_config: PeftConfig | None, token: str | bool | None = None
) -> PeftModel:
    """A trained adapter on its base: to go on with, on what it was stacked on, or frozen under a new one.

    The policy's `adapter_sources` remembers where each came from, for the record beside the trained adapter.
    """
    folder = local_adapter(adapter, token)
    below = adapters_below(adapter) if peft_config is None else [*adapters_below(adapter), adapter]
    for source in [*below, adapter]:
        fit_vocabulary(base, source)
        require_same_rows(base, source)
    if not below:
        with shapes_checked_later(adapter) as options:
            policy = PeftModel.from_pretrained(base, folder, is_trainable=True, **options)
        train_in_fp32(policy)  # before its weights are put in place, which are in fp32 where it was saved
        load_adapter_weights(policy, adapter, "default")
        policy.adapter_sources = {"default": adapter}
        return policy
    require_intact_base(below[0])
    with shapes_checked_later(below[0]) as options:
        policy = PeftModel.from_pretrained(base, local_adapter(below[0]), adapter_name="below", **options)
    load_adapter_weights(policy, below[0], "below")
    policy.adapter_sources = {"below": below[0]}
    for source in below[1:]:
        name = add_saved_adapter(policy, source, "below")
        policy.adapter_sources[name] = source
    policy.base_model.set_adapter(list(policy.adapter_sources))
    name = stack_adapter(policy, peft_config or PeftConfig.from_pretrained(folder))
    if peft_config is None:
        load_adapter_weights(policy, adapter, name)
        policy.adapter_sources[name] = adapter
    return policy


def warn_of_another_quantization(adapter: str, base: PreTrainedModel, token: str | bool | None = None) -> None:
    """Warn if an adapter was trained on its base in other bits, as its record says: the rounding differs."""
    path = Path(local_adapter(adapter, token), RECORD_NAME)
    if not path.is_file():
        return
    then = json.loads(path.read_text()).get("quantization") or {}
    config = getattr(base.config, "quantization_config", None)
    now = {} if config is None else config if isinstance(config, dict) else config.to_dict()
    was, found = (bits(options) for options in (then, now))
    if was != found:
        warnings.warn(
            f"The adapter {adapter} must be on its base as it was trained, {was}, to go on exactly, got {found}. Set "
            "`quantize`, `quantization_config` or `quantize_head`.",
            stacklevel=3,
        )


def bits(quantization: dict[str, Any]) -> str:
    """How a quantisation rounds weights, in words.

    >>> bits({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})
    'in 4 bit (nf4, double)'
    """
    if quantization.get("load_in_4bit"):
        kind = [str(quantization.get("bnb_4bit_quant_type"))]
        kind += ["double"] if quantization.get("bnb_4bit_use_double_quant") else []
        kind += ["head too"] if quantization.get("llm_int8_skip_modules") == [] else []
        return f"in 4 bit ({', '.join(kind)})"
    return "in 8 bit" if quantization.get("load_in_8bit") else "not quantised"


def adapters_below(adapter: str) -> list[str]:
    """The frozen adapters that a saved one was trained on top of, as its record names them, lowest first.

    Raises:
        ValueError: If they were in memory only.
    """
    record = Path(local_adapter(adapter), RECORD_NAME)
    below = json.loads(record.read_text()).get("stacked_on") if record.is_file() else None
    if below == UNKNOWN:
        raise ValueError(
            f"The adapter {adapter} must name the one that it was trained on top of, got one that was in memory only. "
            f"Save that one, and write its folder as `stacked_on` into {record}."
        )
    return [] if below is None else [*adapters_below(check_path(below, "adapter")), check_path(below, "adapter")]


def add_saved_adapter(policy: PeftModel, source: str, stem: str) -> str:
    """A saved adapter beside those of a policy, frozen and not in force; returns its name, made from the stem.

    Raises:
        ValueError: If it is of another kind, changes the base, or does not fit the model.
    """
    folder = local_adapter(source)
    config = PeftConfig.from_pretrained(folder)
    require_intact_base(source)
    kind = policy.peft_config[policy.active_adapters[0]].peft_type
    if config.peft_type != kind:
        raise ValueError(
            f"The adapter {source} must be of the policy's kind, {kind.value}, got {config.peft_type.value}. Merge it "
            "into its base and name that model instead."
        )
    require_same_vocabulary(policy.get_base_model(), source)
    require_same_rows(policy.get_base_model(), source)
    name = free_name(policy, stem)
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    with shapes_checked_later(source) as options:
        policy.load_adapter(folder, name, is_trainable=False, **options)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    load_adapter_weights(policy, source, name)
    return name


def require_intact_base(source: str) -> None:
    """Refuse a saved adapter whose loading would change the base under every other one.

    Raises:
        ValueError: If it would.
    """
    config = PeftConfig.from_pretrained(local_adapter(source))
    if loading_changes_base(config):
        raise ValueError(
            f"The adapter {source} must leave the base as it is, got init_lora_weights={config.init_lora_weights!r}. "
            "Convert it to plain LoRA (PEFT's path_initial_model_for_weight_conversion)."
        )


def load_tokenizer(path_or_id: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model or adapter, with a padding token (EOS if it has none).

    Raises:
        FileNotFoundError: If a folder has none.
    """
    if adapter_folder(path_or_id):
        folder = local_adapter(path_or_id)
        if list(Path(folder).glob("tokenizer*")):
            path_or_id = folder
        else:
            config = PeftConfig.from_pretrained(folder)
            path_or_id = str(config.base_model_name_or_path)
            kwargs.setdefault("revision", config.revision or "main")
    name, kwargs = with_revision(path_or_id, kwargs, "tokenizer")
    with at_revision("tokenizer", name, kwargs.get("revision")):
        try:
            return with_pad_token(AutoTokenizer.from_pretrained(name, **kwargs))
        except (OSError, ValueError) as error:
            if Path(name).is_dir() and not any(found for file in TOKENIZER_FILES for found in Path(name).glob(file)):
                raise FileNotFoundError(
                    f"The folder {name} must hold a tokenizer, got none of its files ({TOKENIZER_FILES[0]}, ...). Save "
                    "it there with tokenizer.save_pretrained."
                ) from error
            raise


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with EOS if it has no padding token: padded positions are never scored or attended to."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_trained(policy: PeftModel, folder: str) -> None:
    """Put the trained adapter that was saved in a folder into the policy; nothing else changes."""
    for name in trained_adapters(policy):
        where = folder if name == "default" else str(Path(folder, name))
        if not Path(where, SAFETENSORS_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"A checkpoint must hold the adapter's weights in {SAFETENSORS_WEIGHTS_NAME}, got none in {where}. "
                "Check the path."
            )
        load_adapter_weights(policy, where, name)
