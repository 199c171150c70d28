"""What the trainer's constructor is given, made into a policy and a tokenizer, or refused."""

import difflib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import transformers
from accelerate import Accelerator, DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.integrations.liger import apply_liger_kernel

from qlora_dpo.adapters import frozen_adapters, stack_adapter, trained_adapters
from qlora_dpo.config import QLoRADPOConfig
from qlora_dpo.data import columns_of, prepare_dataset, value_columns
from qlora_dpo.data_report import DataReport, show
from qlora_dpo.errors import FixableError
from qlora_dpo.layouts import GroupCollator
from qlora_dpo.metrics import HIGHER_IS_BETTER, best_metric_key
from qlora_dpo.model import (
    attach_adapter,
    device_map,
    is_quantized,
    load_base,
    load_policy,
    load_tokenizer,
    with_pad_token,
)
from qlora_dpo.objective import Objective, check_columns
from qlora_dpo.origins import data_origin, named_origin
from qlora_dpo.paths import adapter_folder, with_revision
from qlora_dpo.reference import (
    AdapterReference,
    AverageReference,
    InitialReference,
    NoReference,
    Reference,
    make_reference,
    require_no_other,
)

_TOLD = ("groups", "pairs", "dropped", "truncated_share")
"""What the record says of a report."""


def check_arguments(ref_model: Any, args: Any, data_collator: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse constructor arguments that cannot be honoured."""
    if not isinstance(args, QLoRADPOConfig):
        raise TypeError(f"`args` must be a QLoRADPOConfig, got {type(args).__name__}. Build one from the same options.")
    if ref_model is not None and args.reference != "auto":
        raise ValueError(f"`ref_model` must be None with reference='{args.reference}', got both. Drop one of them.")
    if ref_model is not None and args.sync_ref_model:
        raise NotImplementedError(
            "`ref_model` must be None with `sync_ref_model`, got one: the average is taken of the adapter's weight "
            "change. Leave it out."
        )
    if data_collator is not None and not isinstance(data_collator, GroupCollator):
        raise TypeError(f"`data_collator` must be a GroupCollator, got {type(data_collator).__name__}. Leave it out.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("`train_dataset` or `eval_dataset` must be given, got neither. Pass one.")
    if isinstance(eval_dataset, Mapping) and not eval_dataset:
        raise ValueError("`eval_dataset` must hold a data set, got no name of one. Pass None for no evaluation.")
    if args.sample_generations and eval_dataset is None:
        raise ValueError(
            "`sample_generations` must be 0 without `eval_dataset`, whose prompts it answers, got "
            f"{args.sample_generations}. Pass one."
        )


def settle(args: QLoRADPOConfig) -> None:
    """Set what PyTorch and accelerate would choose otherwise than training here needs it."""
    if args.data_seed is None:
        args.data_seed = args.seed  # or else what torch was last seeded with decides the order of the groups
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # processes may make different numbers of forwards
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if reentrant and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # it would mark what the recomputed layers use twice
    args.accelerator_config.dispatch_batches = False  # it would cut a stream's tensors by their first size


def check_best_metric(args: QLoRADPOConfig, eval_dataset: Any, own_metrics: bool) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will give, hours before it is looked for.

    Args:
        args: The configuration.
        eval_dataset: A data set, several by name, or None.
        own_metrics: Whether the user's `compute_metrics` gives keys that are not known here.

    Raises:
        ValueError: If it is none of the known keys.
    """
    sets = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
    metric = args.metric_for_best_model
    if metric is None or own_metrics or eval_dataset is None or best_metric_key(metric, sets) is not None:
        return
    example = f"eval_{sets[0]}_rewards/accuracies" if sets else "eval_rewards/accuracies"
    close = difflib.get_close_matches(metric.removeprefix("eval_"), HIGHER_IS_BETTER, n=1)
    hint = f"Did you mean {close[0]}?" if close and not sets else f"Use one such as {example}."
    raise ValueError(f"`metric_for_best_model` must be a key of the evaluation, got {metric}. {hint}")


def require_named(sets: Any, name: str) -> None:
    """Refuse the name of a data set that the trainer does not have.

    Raises:
        ValueError: If it has none of that name.
    """
    known = list(sets) if isinstance(sets, Mapping) else []
    if name not in known:
        raise ValueError(
            f"`eval_dataset` must be rows, or the name of one of the trainer's own sets ({known}), got {name!r}. Pass "
            "the rows, or None for the trainer's own."
        )


def require_text(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse rows with images, which a model would be trained on without seeing them.

    Raises:
        NotImplementedError: If there is a column of them.
    """
    columns = columns_of(dataset)
    if found := [column for column in ("image", "images") if column in columns]:
        raise NotImplementedError(
            f"The {name} data set must be of text, got a column `{found[0]}`: images are not built yet. Remove the "
            "column where the text is enough."
        )


def tell_what_metrics_get(args: QLoRADPOConfig) -> None:
    """Say what `compute_metrics` is called with: one that was written for logits would give numbers without a word."""
    if args.process_index == 0:
        print("compute_metrics gets rewards of pairs, (chosen, rejected), and their rows; no logits", file=sys.stderr)


def measured(compute_metrics: Callable[[EvalPrediction], dict[str, float]], of: EvalPrediction) -> dict[str, float]:
    """What the user's `compute_metrics` returns.

    Raises:
        TypeError: If it is no dict.
    """
    found = compute_metrics(of)
    if not isinstance(found, Mapping):
        raise TypeError(f"`compute_metrics` must return a dict, got {type(found).__name__}. Return numbers by name.")
    return dict(found)


class Preparation:
    """Tokenises data sets, checks that the objective can use their columns, and shows what became of their rows.

    Attributes:
        reports: What became of the rows, by the use of the set: `train`, `eval`, `eval_<name>` of several.
        origins: Where they come from: `train`, and for each evaluation, by `result_name`, the rows it was last of.
    """

    def __init__(
        self, args: QLoRADPOConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase, reference: Reference
    ) -> None:
        self.args, self.objective, self.reference = args, objective, reference
        self.reports: dict[str, DataReport] = {}
        self.origins: dict[str, dict[str, Any]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "limits": args.token_limits,
            "pair_strategy": args.pair_strategy,
            "num_proc": args.dataset_num_proc,
            "batch_size": args.per_device_train_batch_size,
        }

    def __call__(self, dataset: Any, name: str) -> Any:
        """One data set, tokenised."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(
                f"A data set must be a datasets.Dataset, got {type(dataset).__name__}. Use Dataset.from_list."
            )
        require_text(dataset, name)
        self.origins[name] = data_origin(dataset)
        with self.args.main_process_first(desc="tokenising"):
            merge = name == "train" and self.args.merge_prompts
            prepared, report = prepare_dataset(dataset, name=name, merge=merge, **self._options)
        columns = value_columns(prepared.column_names or [])
        check_columns(self.objective, columns, self.args.label_smoothing)
        if "ref_logps" in columns:
            require_no_other(self.reference, self.args.reference)
        if report is not None:
            self.reports[name] = report
            self.origins[name] |= {key: getattr(report, key) for key in _TOLD}
            made = [column for column in ("pairs", "scores", "ranks") if column in dataset.column_names]
            if "completions" in dataset.column_names and made and made[0] != "pairs":
                self.origins[name]["pairs_from"] = made[0]
            if self.args.process_index == 0:
                show(report)
        return prepared

    def name(self, which: str, path_or_id: str, config: str | None = None) -> None:
        """Say what a data set was loaded by, where that is known."""
        self.origins[which] = named_origin(self.origins[which], path_or_id, config)
        if which in self._own:
            self._own[which] = self.origins[which]

    def sets(self, dataset: Any) -> Any:
        """The trainer's own data set for evaluation, or several by name."""
        if isinstance(dataset, Mapping):
            prepared: Any = {name: self(one, f"eval_{name}") for name, one in dataset.items()}
        else:
            prepared = self(dataset, "eval")
        self._own = {name: origin for name, origin in self.origins.items() if name != "train"}
        return prepared

    def again(self, name: str | None, prefix: str) -> None:
        """Say that an evaluation is of the trainer's own set (of that name), whatever else had its prefix before."""
        own = self._own.get("eval" if name is None else f"eval_{name}")
        if own is not None:
            self.origins[result_name(prefix)] = own


def result_name(prefix: str) -> str:
    """What the record calls an evaluation: the prefix of its keys; `train` is the data that was trained on.

    >>> [result_name(prefix) for prefix in ("eval", "eval_hard", "test", "train")]
    ['eval', 'eval_hard', 'test', 'eval_train']
    """
    return "eval_train" if prefix == "train" else prefix


def router_coefficient(policy: PeftModel, args: QLoRADPOConfig) -> float:
    """Factor of a mixture of experts' load-balancing loss: the option's, else the model config's, else 0.

    Raises:
        ValueError: If one is asked for and the model has no router.
    """
    config = policy.get_base_model().config.get_text_config()
    asked = args.router_aux_loss_coef
    if not hasattr(config, "output_router_logits"):
        if asked:
            raise ValueError(
                f"`router_aux_loss_coef` must be None or 0 for {config.model_type}, which has no router, got {asked}. "
                "Leave it out."
            )
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked)


def _keywords(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """`model_init_kwargs` as a dict: the command line gives JSON, which `TrainingArguments` has decoded by now."""
    return dict(value) if isinstance(value, dict) else {}


def _quantization(quantization_config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords for loading with the quantisation that the argument or `model_init_kwargs` names.

    A None that `model_init_kwargs` spells out is a model that is loaded as it is, as in transformers.

    Raises:
        ValueError: If both name one.
    """
    if "quantization_config" not in kwargs:
        return kwargs | {"quantization_config": quantization_config}
    if quantization_config is not None:
        raise ValueError(
            "`quantization_config` must be given once, got one as an argument and one in `model_init_kwargs`. Drop the "
            "latter."
        )
    return kwargs | {"quantize": kwargs["quantization_config"] is not None}


def _loaded(model: str, args: QLoRADPOConfig, quantization_config: Any, peft_config: PeftConfig | None) -> PeftModel:
    """The model of a name, with an adapter to train."""
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "device_map": device_map(args.use_cpu)}
    kwargs |= _keywords(args.model_init_kwargs)
    kwargs = _quantization(quantization_config, kwargs)
    if adapter_folder(model):
        kwargs |= {"gradient_checkpointing": bool(args.gradient_checkpointing)}
        return load_policy(model, peft_config=peft_config, **kwargs)
    model, kwargs = with_revision(model, kwargs)
    try:
        base = load_base(model, **kwargs)
    except ValueError as error:
        kind, found, _ = str(error).partition(" for this kind of AutoModel")
        if not found:
            raise
        raise NotImplementedError(
            f"`model` must name a decoder-only language model, got {model} ({kind}). Load another; one that sees "
            "images can be loaded by its own class and passed as an object, to train it on text."
        ) from error
    weights = "4 bit" if is_quantized(base) else str(base.dtype)
    if args.process_index == 0:
        print(f"loaded {model} in {weights}, with {peft_config or 'default LoRA'}", file=sys.stderr)
    return attach_adapter(base, peft_config, kwargs.get("revision"))


def policy_from(model: Any, args: QLoRADPOConfig, quantization_config: Any, peft_config: Any) -> PeftModel:
    """The model with an adapter to train: loaded, wrapped, or as it is."""
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a config of PEFT, got {type(peft_config).__name__}. Use LoraConfig(...)."
        )
    if isinstance(model, str):
        return _loaded(model, args, quantization_config, peft_config)
    if args.model_init_kwargs:
        raise ValueError(
            f"`model_init_kwargs` must be None for a model that is loaded, got {sorted(args.model_init_kwargs)}. Load "
            "the model with them."
        )
    if quantization_config is not None:
        raise ValueError(
            "`quantization_config` must be None for a model that is loaded, got one. Pass the model's name."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"`model` must be a decoder-only language model, got {model.config.model_type}, which has an encoder too. "
            "Load another."
        )
    if isinstance(model, PeftModel):
        if peft_config is not None:
            stack_adapter(model, peft_config)
        return model
    if peft_config is None:
        bare = "a quantised one" if is_quantized(model) else "one"
        raise ValueError(f"`model` must have an adapter to train, got {bare} without. Pass `peft_config`.")
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


def reference_from(policy: PeftModel, ref_model: Any, args: QLoRADPOConfig) -> Reference:
    """The reference that the options and `ref_model` name."""
    if ref_model is not None and ref_model in (policy, policy.get_base_model()):
        raise ValueError("`ref_model` must be another object than `model`, got the same. Leave it out.")
    average = (args.ref_model_mixup_alpha, args.ref_model_max_rank) if args.sync_ref_model else None
    named = isinstance(ref_model, str)
    made = make_reference(
        ref_model if named else args.reference,
        policy,
        args.logps_chunk_size,
        ref_model=None if named else ref_model,
        ignored=args.objective.ignores_reference,
        in_4bit=args.reference_in_4bit,
        average=average,
        model_kwargs={"trust_remote_code": args.trust_remote_code, "device_map": device_map(args.use_cpu)},
    )
    if not args.reference_in_4bit and isinstance(made, AdapterReference):
        raise ValueError(
            f"`reference_in_4bit` must be True for the adapter {made.source}, which lies on the policy's own base, got "
            "False. Leave it out."
        )
    return made


def require_own_folder(args: QLoRADPOConfig, policy: PeftModel, reference: Reference) -> None:
    """Refuse to write over the base or an adapter that the result is on top of, or is compared with.

    A base with an adapter in its folder would be loaded with that adapter on it.

    Raises:
        ValueError: If `output_dir` is the folder of one.
    """
    sources = getattr(policy, "adapter_sources", {})
    base = policy.get_base_model().config._name_or_path or None
    for needed in (base, *(sources.get(name) for name in frozen_adapters(policy)), reference.source):
        if needed is not None and Path(needed).resolve() == Path(args.output_dir).resolve():
            raise ValueError(
                f"`output_dir` must be another folder than that of the base, the adapter below or the reference, got "
                f"{args.output_dir}, which would be written over. Name a new one."
            )


def require_shardable(accelerator: Accelerator, args: QLoRADPOConfig, reference: Reference) -> bool:
    """Whether processes hold parts of the model each (FSDP2); every other way to split it is refused.

    Processes that share weights must make their forwards together, one for each micro-batch.

    Raises:
        NotImplementedError: For DeepSpeed, FSDP1, and references that put other weights in place.
        FixableError: For versions of libraries that are too old.
        ValueError: If `fsdp` would be ignored, or a token budget would give processes different numbers of forwards.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or args.deepspeed:
        raise NotImplementedError("`deepspeed` must be left out, got one. Use DDP or FSDP2 (examples/multi_gpu).")
    if kind != DistributedType.FSDP:
        if args.fsdp:
            raise ValueError(
                f"`fsdp` must be left out where no processes with a GPU each share the model, got {args.fsdp!r}. Start "
                "with torchrun or accelerate (examples/multi_gpu), or leave it out."
            )
        return False
    if not getattr(peft.import_utils, "is_transformers_dtensor_tp", False):
        raise FixableError(
            "FSDP must have versions that load an adapter into the parts of a model, got transformers "
            f"{transformers.__version__} and peft {peft.__version__}. Upgrade them: 5.23 and 0.21.2 are tested."
        )
    if not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP must be version 2, got 1. Set `fsdp_version: 2` (examples/multi_gpu).")
    if isinstance(reference, (InitialReference, AverageReference)) and not args.precompute_ref_log_probs:
        raise NotImplementedError(
            f"`reference` must be base, none, an adapter or a model with FSDP, got {reference.description}. Set "
            '`precompute_ref_log_probs`, `reference="base"`, or use DDP.'
        )
    if args.max_tokens_per_forward not in (None, "auto"):
        raise ValueError(
            f"`max_tokens_per_forward` must be left out with FSDP, got {args.max_tokens_per_forward}: all processes "
            "make one forward a micro-batch. Lower `per_device_train_batch_size`."
        )
    return True


def describe(policy: PeftModel) -> str:
    """What is trained, in a line for people."""
    base = policy.get_base_model()
    names = trained_adapters(policy)
    adapters = ", ".join(f"{policy.peft_config[name].peft_type.value} adapter '{name}'" for name in names)
    below = frozen_adapters(policy)
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    weights = "4-bit" if getattr(base, "is_loaded_in_4bit", False) else str(base.dtype).removeprefix("torch.")
    stacked = f" on the frozen {', '.join(map(repr, below))}" if below else ""
    return f"{adapters}{stacked} ({count:,} trainable weights) on {base.config._name_or_path or 'a model'} in {weights}"


def use_liger(model: Any, args: QLoRADPOConfig) -> None:
    """Give a model's layers Liger's kernels, and say so if it has none for them."""
    apply_liger_kernel(model, args.liger_kernel_config)
    if not any("Liger" in str(module.forward) for module in model.modules()):
        kind = model.config.model_type
        warnings.warn(f"`use_liger_kernel` has no effect: Liger has no kernels for {kind}. Leave it out.", stacklevel=2)


def _emulates_casts() -> bool:
    """Whether compiled programs round where others would; imported here, as it takes time."""
    import torch._inductor.config as compiling

    return bool(compiling.emulate_precision_casts)


def announce(policy: PeftModel, reference: str, margin: float, args: QLoRADPOConfig) -> None:
    """One line at the start of a training: policy, reference, step-0 margin (nats), and what compiling does."""
    exactly = " (exactly 0)" if margin == 0 else ""
    parts = [f"policy: {describe(policy)}", f"reference: {reference}"]
    print(*parts, f"largest step-0 margin: {margin:.3g} nats{exactly}", sep="; ", file=sys.stderr)
    compiled = args.torch_compile and args.torch_compile_backend == "inductor"
    if compiled and reference != NoReference.description and not _emulates_casts():
        warnings.warn(
            "`torch_compile` makes two programs, of the policy and of its reference, which round in other places: "
            "rewards get noise, and the first margins are not exactly 0 (0.2 nats for completions of 400 tokens, "
            "measured in bf16). Leave it out, or set torch._inductor.config.emulate_precision_casts (0.0004 nats).",
            stacklevel=2,
        )
