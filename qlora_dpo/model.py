"""Loading: a 4-bit base with LoRA adapters attached, ready to train."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_dpo.adapters import loading_changes_base, stack_adapter, trained_adapters
from qlora_dpo.config import best_precision


def compute_dtype() -> torch.dtype:
    """bf16, or fp16 on a GPU without bf16."""
    return torch.float16 if best_precision() == "fp16" else torch.bfloat16


def default_quantization() -> BitsAndBytesConfig:
    """NF4 with double quantisation and 16-bit compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )


def default_lora() -> LoraConfig:
    """LoRA of rank 16 on every linear layer but the head."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def keep_one_arithmetic(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from changing their arithmetic when they first run in eval mode.

    bitsandbytes repacks the weight of a layer that runs in eval mode on a CPU with AVX512-BF16, for good: from then on
    it computes in another arithmetic and has no backward pass, so training after one `evaluate()` or `generate()` goes
    on with wrong gradients and no error. Switched off per layer; without effect on a GPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(model: nn.Module) -> bool:
    """Whether the model's weights are in 4 or 8 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def adapter_folder(path_or_id: str) -> bool:
    """Whether a local folder holds an adapter."""
    return Path(path_or_id, "adapter_config.json").is_file()


def check_path(path_or_id: str, what: str) -> str:
    """Refuse a local path that is not there before anything tries to download it.

    Raises:
        FileNotFoundError: If it looks like a path and is not one.
    """
    looks_local = path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1
    if looks_local and not Path(path_or_id).expanduser().exists():
        raise FileNotFoundError(f"The {what} must be a folder or a Hub id, got {path_or_id}. Check the path.")
    return str(Path(path_or_id).expanduser()) if looks_local else path_or_id


def device_map() -> dict[str, Any]:
    """The whole model on this process's device."""
    if not torch.accelerator.is_available():
        return {"": "cpu"}
    return {"": int(os.environ.get("LOCAL_RANK", 0))}


def load_base(model_id: str, quantization_config: Any = None, quantize: bool = True, **kwargs: Any) -> PreTrainedModel:
    """A causal LM without adapters: in NF4 unless told otherwise, the rest of its weights in 16 bit.

    Args:
        model_id: Hub id or folder.
        quantization_config: How to quantise; None for `default_quantization()`.
        quantize: False to load the weights as they are.
        **kwargs: Passed to `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).

    Returns:
        The model, `use_cache` off.
    """
    if quantize and quantization_config is None and "quantization_config" not in kwargs:
        quantization_config = default_quantization()
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if "torch_dtype" in kwargs:  # the older name
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    kwargs.setdefault("dtype", compute_dtype())
    kwargs.setdefault("device_map", device_map())
    model = AutoModelForCausalLM.from_pretrained(check_path(model_id, "model"), **kwargs)
    model.config.use_cache = False
    keep_one_arithmetic(model)
    head = model.get_output_embeddings()
    if hasattr(head, "compute_dtype") and head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            "A 4-bit head must not be tied to the embeddings, which stay in 16 bit, got one that is. Leave the head "
            "out of the quantisation (llm_int8_skip_modules)."
        )
    return model


def attach_adapter(
    model: PreTrainedModel, peft_config: PeftConfig | None = None, revision: str | None = None
) -> PeftModel:
    """A new adapter on a base; its weights in fp32 whatever the base's dtype.

    bf16 adapters keep only a tenth of their updates at a learning rate of 5e-6. `revision` is that of the base, which
    the adapter's config keeps.

    Raises:
        ValueError: If the model has an adapter already.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model must have no adapter yet, got one that transformers loaded. Load the base alone.")
    policy = get_peft_model(model, peft_config or default_lora(), revision=revision)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return policy


def load_policy(
    model_id: str,
    *,
    peft_config: PeftConfig | None = None,
    adapter: str | None = None,
    stacked_on: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    quantize: bool = True,
    gradient_checkpointing: bool = True,
    **model_kwargs: Any,
) -> PeftModel:
    """A 4-bit base with LoRA adapters attached, ready to train.

    Args:
        model_id: Hub id or folder of the base model, or of an adapter (its base is then looked up).
        peft_config: The new adapter; None for LoRA of rank 16 on every linear layer but the head. With `adapter`, it is
            stacked on that one, which is frozen.
        adapter: Hub id or folder of a trained adapter to load: to go on with, or to stack `peft_config` on.
        stacked_on: Hub id or folder of the frozen adapter that `adapter` was trained on top of.
        quantization_config: How to quantise the base; None for NF4 with double quantisation and 16-bit compute.
        quantize: False to keep the base in 16 bit.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        **model_kwargs: Passed to `from_pretrained` (`revision`, `attn_implementation`, `trust_remote_code`, ...).

    Returns:
        The policy: adapters in fp32 and trainable, everything else frozen.

    Raises:
        FileNotFoundError: If a local path is not there.
        ValueError: If a new adapter shall be stacked on one whose loading changes the base.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """
    if adapter is None and adapter_folder(model_id):
        adapter, model_id = model_id, base_of(model_id)
    base = load_base(model_id, quantization_config, quantize, **model_kwargs)
    if adapter is None:
        policy = attach_adapter(base, peft_config, model_kwargs.get("revision"))
    else:
        policy = _with_trained(base, check_path(adapter, "adapter"), peft_config, stacked_on)
    if gradient_checkpointing:
        checkpoint_activations(policy)
    return policy


def _with_trained(
    base: PreTrainedModel, adapter: str, peft_config: PeftConfig | None, stacked_on: str | None
) -> PeftModel:
    """A trained adapter on its base: to go on with, perhaps on top of a frozen one, or frozen under a new one.

    The policy's `adapter_sources` remembers where each came from, for the record beside the trained adapter.
    """
    below = stacked_on if peft_config is None else adapter
    if below is None:
        policy = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        policy.adapter_sources = {"default": adapter}
        return policy
    if loading_changes_base(PeftConfig.from_pretrained(below)):
        raise ValueError(
            f"An adapter to stack on must leave the base as it is, got {below}, whose initialisation changes it. "
            "Convert it to plain LoRA (PEFT's path_initial_model_for_weight_conversion)."
        )
    policy = PeftModel.from_pretrained(base, below, adapter_name="below")
    policy.adapter_sources = {"below": below}
    if peft_config is not None:
        stack_adapter(policy, peft_config)
    else:
        stack_adapter(policy, PeftConfig.from_pretrained(adapter))
        set_peft_model_state_dict(policy, load_peft_weights(adapter, device="cpu"), adapter_name="default")
        policy.adapter_sources["default"] = adapter
    return policy


def base_of(adapter: str) -> str:
    """The base model that an adapter names."""
    return str(PeftConfig.from_pretrained(adapter).base_model_name_or_path)


def checkpoint_activations(model: Any) -> None:
    """Turn on gradient checkpointing that works with frozen embeddings: the non-reentrant kind."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def load_tokenizer(path_or_id: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model or adapter, with a padding token (EOS if it has none)."""
    if adapter_folder(path_or_id) and not list(Path(path_or_id).glob("tokenizer*")):
        path_or_id = base_of(path_or_id)
    tokenizer = AutoTokenizer.from_pretrained(check_path(path_or_id, "tokenizer"), **kwargs)
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with EOS if it has no padding token: padded positions are never scored or attended to."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_trained(policy: PeftModel, folder: str) -> None:
    """Put the trained adapter that was saved in a folder into the policy; nothing else changes."""
    for name in trained_adapters(policy):
        where = folder if name == "default" else str(Path(folder, name))
        if not any(Path(where, file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise FileNotFoundError(
                f"A checkpoint must hold the adapter's weights, got none in {where}. Check the path."
            )
        set_peft_model_state_dict(policy, load_peft_weights(where, device="cpu"), adapter_name=name)
