"""What the trainer's constructor is given, made into a policy and a tokenizer, or refused."""

import sys
import warnings
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.layouts import GroupCollator
from qlora_dpo.model import (
    adapter_folder,
    attach_adapter,
    is_quantized,
    load_base,
    load_policy,
    load_tokenizer,
    with_pad_token,
)


def check_arguments(ref_model: Any, args: Any, data_collator: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse constructor arguments that cannot be honoured."""
    if not isinstance(args, QLoRADPOConfig):
        raise TypeError(f"`args` must be a QLoRADPOConfig, got {type(args).__name__}. Build one from the same options.")
    if ref_model is not None:
        raise NotImplementedError(
            f"`ref_model` must be None for now, got {type(ref_model).__name__}: the reference is the base model with "
            "its adapters disabled."
        )
    if data_collator is not None and not isinstance(data_collator, GroupCollator):
        raise TypeError(f"`data_collator` must be a GroupCollator, got {type(data_collator).__name__}. Leave it out.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("`train_dataset` or `eval_dataset` must be given, got neither. Pass one.")


def warn_of_router(policy: PeftModel, args: QLoRADPOConfig) -> None:
    """Say that a mixture of experts trains without the auxiliary loss that its config asks for."""
    config = policy.get_base_model().config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient and args.router_aux_loss_coef is None:
        warnings.warn(
            f"The router's auxiliary loss (coefficient {coefficient} in the model's config) is not added to the loss "
            "yet. Set router_aux_loss_coef=0.0 to agree.",
            stacklevel=3,
        )


def _keywords(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """`model_init_kwargs` as a dict: the command line gives JSON, which `TrainingArguments` has decoded by now."""
    return dict(value) if isinstance(value, dict) else {}


def policy_from(model: Any, args: QLoRADPOConfig, quantization_config: Any, peft_config: Any) -> PeftModel:
    """The model with an adapter to train: loaded, wrapped, or as it is."""
    if isinstance(model, str):
        kwargs = {"trust_remote_code": args.trust_remote_code} | _keywords(args.model_init_kwargs)
        if adapter_folder(model):
            return load_policy(model, peft_config=peft_config, quantization_config=quantization_config, **kwargs)
        base = load_base(model, quantization_config, **kwargs)
        weights = "4 bit" if is_quantized(base) else str(base.dtype)
        if args.process_index == 0:
            print(f"loaded {model} in {weights}, with {peft_config or 'default LoRA'}", file=sys.stderr)
        return attach_adapter(base, peft_config, kwargs.get("revision"))
    if args.model_init_kwargs:
        raise ValueError(
            "`model_init_kwargs` must be None for a model that is loaded, got some. Load the model with them."
        )
    if quantization_config is not None:
        raise ValueError(
            "`quantization_config` must be None for a model that is loaded, got one. Pass the model's name."
        )
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise NotImplementedError(
                "`peft_config` must be None for a model that has an adapter, got both: stacked adapters are not built "
                "yet. Merge the adapter into the base, or train it."
            )
        return model
    if peft_config is None:
        quantized = "A quantised model" if is_quantized(model) else "A model without adapters"
        raise ValueError(f"{quantized} cannot be trained by itself, got no adapter. Pass `peft_config`.")
    return attach_adapter(model, peft_config)


def tokenizer_from(model: Any, policy: PeftModel, args: QLoRADPOConfig, tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the model's own."""
    if tokenizer is None:
        source = model if isinstance(model, str) else policy.get_base_model().config._name_or_path
        if not source:
            raise ValueError("`processing_class` must be given for a model without a name, got None. Pass it.")
        revision = _keywords(args.model_init_kwargs).get("revision")
        options = {} if revision is None else {"revision": revision}
        return load_tokenizer(source, trust_remote_code=args.trust_remote_code, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`processing_class` must be a tokenizer, got {type(tokenizer).__name__}. Pass the tokenizer.")
    return with_pad_token(tokenizer)
