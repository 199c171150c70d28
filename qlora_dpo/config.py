"""`QLoRADPOConfig`: `transformers.TrainingArguments` with what DPO needs.

Field names and defaults are those of TRL's `DPOConfig` where the concept is the same. A field of TRL that cannot be
honoured yet is accepted at its neutral value, so that scripts run, and refused at any other.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from qlora_dpo.data import TokenLimits
from qlora_dpo.layouts import LAYOUTS
from qlora_dpo.losses import LOSSES, RANGES
from qlora_dpo.metrics import HIGHER_IS_BETTER
from qlora_dpo.objective import DIVERGENCES, Objective, check_mergeable, check_reference, make_objective
from qlora_dpo.preferences import PAIR_STRATEGIES
from qlora_dpo.typed import check_types, may_be_none, read_plainly, refuse_changed, without_numpy

BATCH_LAYOUTS = ("auto", *LAYOUTS)

REFERENCES = ("auto", "base", "initial", "none")
"""What `reference` may say beside the path or id of an adapter or a model."""

_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "truncation_mode": ("keep_start",),
    "pad_to_multiple_of": (None, "auto"),
    "pad_token": (None,),
    "train_sampling_strategy": ("random", "sequential"),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),  # its strength follows a sequence's length, and rows hold many that share tokens
    "batch_eval_metrics": (False,),
    "bf16_full_eval": (False,),  # an evaluation would round the adapters for good
    "fp16_full_eval": (False,),
    "include_for_metrics": ([],),
    "logging_nan_inf_filter": (False,),  # a line of the log pools pairs, and one that is not finite is shown
    "prediction_loss_only": (False,),  # an evaluation is all of its pairs
}
"""Fields that are not honoured, with the values that ask for nothing: TRL's, and some of TrainingArguments."""

LOSS_FIELDS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
    "simpo_gamma",
    "orpo_lambda",
    "cpo_alpha",
    "dpop_lambda",
    "bco_running_mean",
    "router_aux_loss_coef",
)
"""Fields that decide the loss; `qlora_dpo.json` keeps them."""

EVALUATION_FIELDS = (
    *("output_dir", "seed", "full_determinism", "use_cpu", "bf16", "fp16", "tf32", "trust_remote_code"),
    *("beta", "reference", "reference_in_4bit", "precompute_ref_log_probs", "reference_cache"),
    *("max_length", "max_prompt_length", "pair_strategy", "dataset_num_proc"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_kl", "sample_generations"),
    *("sample_max_new_tokens", "batch_layout", "max_tokens_per_forward", "logps_chunk_size", "padding_free"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("accelerator_config", "fsdp", "fsdp_config", "ddp_backend", "ddp_timeout"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)
"""Fields that change what one evaluation of a saved adapter does; its loss is the one it was trained with."""

_COUNTS = (
    "max_length",
    "max_prompt_length",
    "logps_chunk_size",
    "max_tokens_per_forward",
    "dataset_num_proc",
    "precompute_ref_batch_size",
    "ref_model_sync_steps",
    "ref_model_max_rank",
    "sample_generations_every",
    "sample_max_new_tokens",
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
)
_CHECKED_WITH_LOSSES = ("loss_type", "loss_weights")
_MODIFIERS = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "bco_running_mean")


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


def best_precision() -> str:
    """`bf16` where the device computes in it (a CPU does), else `fp16`.

    GPUs before Ampere hold bf16 too, and emulate its arithmetic: their matrix units have that of fp16 only.
    """
    lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if lacks else "bf16"


@dataclass(repr=False)  # a dataclass's own would show `hub_token`
class QLoRADPOConfig(TrainingArguments):
    """Arguments of `QLoRADPOTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Defaults that differ from `TrainingArguments`, as in TRL: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on (`fp16` on a GPU without bf16). `use_cpu` is set where there is no
    accelerator. `logging_nan_inf_filter` is off.

    `per_device_train_batch_size` counts groups: a prompt with all its completions and pairs.
    """

    learning_rate: float = field(default=1e-6, metadata=_help("The initial learning rate for AdamW."))
    logging_steps: float = field(
        default=10,
        metadata=_help("Log every X update steps; a number below 1 is a share of all steps."),
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Only False: a loss that is not finite is shown, not hidden.")
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata=_help("Recompute activations in the backward pass instead of keeping them."),
    )
    keep_layers: int | str | None = field(
        default="auto",
        metadata=_help(
            "Decoder layers, the last ones, whose activations are kept instead of recomputed, with "
            "`gradient_checkpointing`: more memory, less to compute, the same gradient. `auto`: as many as the plan "
            "finds room for, on a GPU, or on a CPU in half of its free memory. `none`: 0."
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=_help(
            "Keep what the backward pass needs in CPU memory, on a CUDA device: less of its memory, more to copy."
        ),
    )
    fp16: bool = field(default=False, metadata=_help("Compute in fp16 mixed precision, for a GPU without bf16."))
    bf16: bool | None = field(
        default=None,
        metadata=_help("Compute in bf16 mixed precision. Default: on, unless `fp16` is or the GPU has no bf16."),
    )

    beta: float = field(
        default=0.1, metadata=_help("Strength of the pull to the reference, > 0. The tau of the IPO paper for `ipo`.")
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata=_help(f"One loss or several, of {sorted(LOSSES)}."),
    )
    loss_weights: list[float] | None = field(default=None, metadata=_help("Factor of each loss (MPO). None: 1 each."))
    label_smoothing: float = field(
        default=0.0,
        metadata=_help(
            "Probability that a label is flipped, in [0, 0.5), for `sigmoid` (cDPO), `robust`, `exo_pair` (above 0), "
            "`aot` and `aot_unpaired`."
        ),
    )
    ld_alpha: float | None = field(
        default=None,
        metadata=_help(
            "Factor of tokens beyond the shorter side of a pair, in [0, 1] (LD-DPO). None: count all alike."
        ),
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata=_help(f"Divergence from the reference, one of {DIVERGENCES} (f-DPO).")
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata=_help("Coefficient of `alpha_divergence`; 1 is `reverse_kl`.")
    )
    use_weighting: bool = field(
        default=False, metadata=_help("Weigh pairs by how likely the policy is to write them (WPO).")
    )
    discopop_tau: float = field(default=0.05, metadata=_help("Temperature of `discopop`, in (0, 1]."))
    simpo_gamma: float = field(default=0.5, metadata=_help("Target margin of `simpo`, 0 or more."))
    orpo_lambda: float = field(default=0.1, metadata=_help("Factor of the odds ratio in `orpo`, above 0."))
    cpo_alpha: float = field(default=1.0, metadata=_help("Factor of the likelihood in `cpo`, 0 or more."))
    dpop_lambda: float = field(
        default=50.0, metadata=_help("Factor of the penalty in `dpop` on a chosen completion that got less likely.")
    )
    bco_running_mean: bool = field(
        default=False,
        metadata=_help("Shift rewards in `bco_pair` by their running mean, as in its paper; False is TRL's."),
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=_help("Factor of a mixture of experts' load-balancing loss. None: the model config's. 0: none."),
    )

    reference: str = field(
        default="auto",
        metadata=_help(
            "What the policy is compared with: `base` (adapters disabled), `initial` (a frozen copy of the policy's "
            "start), `none`, or the path or id of an adapter or a model. `auto`: the policy's start, whatever it is.",
        ),
    )
    reference_in_4bit: bool = field(
        default=True, metadata=_help("Load a model that `reference` names in 4 bit (NF4); False: in 16 bit.")
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata=_help("Compute the reference's log-probabilities once, before training, and keep them on disk."),
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata=_help("Groups in a batch of that. None: `per_device_eval_batch_size`.")
    )
    reference_cache: str | None = field(
        default=None, metadata=_help("File to keep them in. None: qlora_dpo/reference_logps.sqlite in HF_HOME.")
    )
    sync_ref_model: bool = field(
        default=False, metadata=_help("Let the reference follow the policy by exponential average (TR-DPO).")
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("Share of the policy in each update of the reference, in (0, 1].")
    )
    ref_model_sync_steps: int = field(default=512, metadata=_help("Steps between updates of the reference."))
    ref_model_max_rank: int = field(
        default=128, metadata=_help("Rank above which the reference's averaged weight change is compressed.")
    )

    max_length: int | None = field(
        default=1024,
        metadata=_help(
            "Most tokens of prompt + completion. A prompt this long drops its group, completions are cut at their end. "
            "None: no limit."
        ),
    )
    max_prompt_length: int | None = field(
        default=None, metadata=_help("Most tokens of a prompt; its last ones are kept. None: no limit of its own.")
    )
    pair_strategy: str = field(
        default="all", metadata=_help(f"How scores or ranks become pairs, one of {sorted(PAIR_STRATEGIES)}.")
    )
    merge_prompts: bool = field(
        default=False,
        metadata=_help(
            "Put training rows with one prompt into one group, so that the prompt, and completions that several have, "
            "are computed once. Each pair's loss stays; a batch counts groups, so that its pairs are others."
        ),
    )
    dataset_num_proc: int | None = field(default=None, metadata=_help("Processes to tokenise the data with."))

    batch_layout: str = field(
        default="auto",
        metadata=_help(
            f"How tokens are placed in rows, one of {BATCH_LAYOUTS}. `auto`: `tree` (each prompt and completion once, "
            "no padding) if it proves equal to one row per completion on this model, else `padded`."
        ),
    )
    max_tokens_per_forward: int | str | None = field(
        default="auto",
        metadata=_help(
            "Most tokens of one forward and backward; a batch beyond it is cut into pieces with the same gradient. "
            "None: no limit. `auto`: what `qlora-dpo plan` finds room for on the GPU; on a CPU no limit."
        ),
    )
    logps_chunk_size: int | None = field(
        default=None,
        metadata=_help("Positions whose logits exist at a time. None: as the vocabulary asks for."),
    )
    padding_free: bool = field(
        default=False, metadata=_help("Never pad, as `tree` and `packed` do; refuses `batch_layout='padded'`.")
    )
    eval_kl: bool = field(
        default=True,
        metadata=_help(
            "Log the exact divergence from the reference in evaluations (`kl/*`, nats per token), at the price of two "
            "more passes through the LM head; where both share the model and a head that nothing adapts or trains, and "
            "the reference is neither cached nor given."
        ),
    )
    sample_generations: int = field(
        default=0,
        metadata=_help("Prompts of the evaluation set to answer after evaluations, by policy and reference. 0: none."),
    )
    sample_generations_every: int = field(default=1, metadata=_help("Evaluations from one such sample to the next."))
    sample_max_new_tokens: int = field(default=128, metadata=_help("Most tokens of such an answer."))
    disable_dropout: bool = field(
        default=True, metadata=_help("Set every dropout probability of the model to zero, the adapter's too.")
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Keyword arguments of `from_pretrained`, for a model given as a string.")
    )
    trust_remote_code: bool = field(default=False, metadata=_help("Run Python code that a model repository ships."))

    truncation_mode: str = field(default="keep_start", metadata=_help("Only `keep_start`: cut at the end."))
    pad_to_multiple_of: int | str | None = field(default="auto", metadata=_help("Not built yet: only None or `auto`."))
    pad_token: str | None = field(default=None, metadata=_help("Set `tokenizer.pad_token` instead."))

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        self._read_as_the_command_line_does()
        check_types(self, QLoRADPOConfig, _CHECKED_WITH_LOSSES)
        self._set_device_and_precision()
        if getattr(self, "activation_checkpointing", False) is None:  # the newer name of the same field
            self.activation_checkpointing = self.gradient_checkpointing
        self._check()
        self._know_the_better_direction()
        super().__post_init__()
        if not isinstance(self.model_init_kwargs, (dict, type(None))):
            raise TypeError(
                f"`model_init_kwargs` must be a dict, or one as JSON, got {self.model_init_kwargs!r}. Write "
                """'{"attn_implementation": "eager"}'."""
            )
        if not self.accelerator_config.use_seedable_sampler:
            raise ValueError(
                "`accelerator_config.use_seedable_sampler` must be True, or a run that goes on would see its groups in "
                "another order, got False. Leave it out."
            )

    def _read_as_the_command_line_does(self) -> None:
        """One loss as a list of one, and numbers that YAML leaves as text (`1e-1`), or numpy has, as plain numbers."""
        without_numpy(self)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_weights, (int, float)):
            self.loss_weights = [self.loss_weights]
        if not isinstance(self.loss_type, (list, tuple)):
            raise TypeError(f"`loss_type` must be a name or a list of them, got {self.loss_type!r}. Use 'sigmoid'.")
        if getattr(self, "report_to", None) in (None, False):  # as YAML has `null` and `no`
            self.report_to = "none"
        read_plainly(self, QLoRADPOConfig, _CHECKED_WITH_LOSSES)

    def _know_the_better_direction(self) -> None:
        """Whether a higher value of `metric_for_best_model` is better: Trainer takes all but losses for higher."""
        if self.metric_for_best_model and getattr(self, "greater_is_better", None) is None:
            ends = [key for key in HIGHER_IS_BETTER if self.metric_for_best_model.endswith(key)]
            if ends:
                self.greater_is_better = HIGHER_IS_BETTER[max(ends, key=len)]

    def _set_device_and_precision(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.fp16:
            raise ValueError("`fp16` must be False on a CPU, got True. Use bf16, or neither for fp32.")
        if self.bf16 is None:
            self.fp16 = bool(self.fp16) or (not self.use_cpu and best_precision() == "fp16")
            self.bf16 = not self.fp16

    def _check(self) -> None:
        """Refuse what cannot be right, with the way out."""
        for name, neutral in _NOT_BUILT.items():
            if getattr(self, name, neutral[0]) not in neutral:
                raise NotImplementedError(
                    f"`{name}` must be {neutral[0]!r} for now, got {getattr(self, name)!r}. Leave it out."
                )
        self._check_choice("batch_layout", self.batch_layout, BATCH_LAYOUTS)
        self._check_choice("pair_strategy", self.pair_strategy, tuple(PAIR_STRATEGIES))
        if self.padding_free and self.batch_layout == "padded":
            raise ValueError("`padding_free` must be False with batch_layout='padded', got True. Drop one of them.")
        check_reference(self.objective, self.reference)
        if self.merge_prompts:
            check_mergeable(self.objective)
        self._check_reference_options()
        self._check_samples()
        self._check_memory()
        self._leave_the_head_to_us()
        if isinstance(self.max_tokens_per_forward, str) and self.max_tokens_per_forward != "auto":
            raise ValueError(
                f"`max_tokens_per_forward` must be a number, None or 'auto', got {self.max_tokens_per_forward!r}. "
                "Leave it out for 'auto'."
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, str) and value is not None and value < 1:
                none = ", or None" if may_be_none(QLoRADPOConfig, name) else ""
                raise ValueError(f"`{name}` must be 1 or more{none}, got {value}. Leave it out for the default.")
        self._check_steps()

    def _check_steps(self) -> None:
        """Refuse a training of no steps, of which `Trainer` makes one, and a norm with which it fails later."""
        if self.max_steps is None or self.max_steps == 0:
            raise ValueError(
                f"`max_steps` must be 1 or more, or -1 for `num_train_epochs`, got {self.max_steps}. Leave it out."
            )
        if self.max_grad_norm is None:
            raise ValueError("`max_grad_norm` must be a number, got None. Use 0 to clip nothing.")

    def _check_samples(self) -> None:
        """Refuse options of answers that nobody asked for."""
        if self.sample_generations < 0:
            raise ValueError(f"`sample_generations` must be 0 or more, got {self.sample_generations}. 0 is for none.")
        if not self.sample_generations:
            refuse_changed(self, ("sample_generations_every", "sample_max_new_tokens"), "sample_generations above 0")

    def _check_reference_options(self) -> None:
        """Refuse what cannot go with a reference that moves, and options of a reference that there is not."""
        if self.reference in REFERENCES:
            refuse_changed(self, ("reference_in_4bit",), "the path or id of a model in `reference`")
        if not self.precompute_ref_log_probs:
            refuse_changed(self, ("precompute_ref_batch_size", "reference_cache"), "precompute_ref_log_probs=True")
        if not self.sync_ref_model:
            names = ("ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_max_rank")
            refuse_changed(self, names, "sync_ref_model=True")
            return
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"`ref_model_mixup_alpha` must be in (0, 1], got {self.ref_model_mixup_alpha}. 0.6 is usual."
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs` must be False with `sync_ref_model`, whose reference moves, got True. Drop "
                "one of them."
            )
        self._check_choice("reference", self.reference, ("auto", "base", "initial"), " with `sync_ref_model`")

    @property
    def recomputes(self) -> bool:
        """Whether gradient checkpointing is on, under its newer or its older name."""
        return bool(getattr(self, "activation_checkpointing", self.gradient_checkpointing))

    def _check_memory(self) -> None:
        """Refuse to keep layers where none is recomputed, and to move activations to where they are."""
        asked = self.keep_layers
        if not (asked in (None, "auto") or (not isinstance(asked, str) and asked >= 0)):
            raise ValueError(f"`keep_layers` must be a number of layers, 0 or more, or 'auto', got {asked!r}. Use 0.")
        if asked not in (None, 0, "auto") and not self.recomputes:
            raise ValueError(
                f"`keep_layers` must be 0 without `gradient_checkpointing`, where every layer is kept, got {asked}. "
                "Leave it out."
            )
        if self.activation_offloading and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError(
                "`activation_offloading` must be False without a CUDA device: activations are in CPU memory already, "
                "got True. Leave it out."
            )

    def _leave_the_head_to_us(self) -> None:
        """Take Liger's kernels for layers, and none of those that make a loss from logits of their own."""
        if not self.use_liger_kernel:
            return
        if self.use_cpu:
            raise ValueError("`use_liger_kernel` must be False on a CPU, got True. Leave it out.")
        if not is_liger_kernel_available():
            raise ValueError("`use_liger_kernel` must be False without the package liger-kernel, got True. Install it.")
        chosen = self.liger_kernel_config or {}  # type: ignore[has-type]
        for name in ("cross_entropy", "fused_linear_cross_entropy"):
            if chosen.get(name):
                raise ValueError(
                    f"`liger_kernel_config` must not ask for {name}, another loss, got {chosen[name]}. Leave it out."
                )
        self.liger_kernel_config = {**chosen, "cross_entropy": False, "fused_linear_cross_entropy": False}

    def __str__(self) -> str:
        return "\n".join([f"{type(self).__name__}(", *(f"{k}={v}," for k, v in sorted(self.to_dict().items())), ")"])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, for trackers: with no token, also not among `model_init_kwargs`."""
        found = super().to_dict() | {"pad_token": self.pad_token}  # a token of texts, which is no secret
        options = found.get("model_init_kwargs")
        if isinstance(options, dict) and "token" in options:
            found["model_init_kwargs"] = options | {"token": "<TOKEN>"}
        return found

    def _check_choice(self, name: str, value: str, choices: tuple[str, ...], beside: str = "") -> None:
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}{beside}, got {value!r}. Use {choices[0]!r}.")

    @property
    def token_limits(self) -> TokenLimits:
        """The limits on lengths."""
        return TokenLimits(self.max_length, self.max_prompt_length)

    @property
    def arithmetic(self) -> str:
        """`bf16`, `fp16` or `no`: the mixed precision of the computation."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def rounding(self) -> str:
        """The arithmetic, and what else decides how its numbers are rounded."""
        return self.arithmetic + "+liger" * self.use_liger_kernel + "+compiled" * self.torch_compile

    @property
    def objective(self) -> Objective:
        """What a step minimises, checked."""
        values = {name: getattr(self, name) for name in RANGES if hasattr(self, name)}
        modifiers = {name: getattr(self, name) for name in _MODIFIERS}
        return make_objective(self.loss_type, self.loss_weights, values, **modifiers)
