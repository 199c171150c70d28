"""`QLoRADPOConfig`: `transformers.TrainingArguments` with what DPO needs.

Field names and defaults are those of TRL's `DPOConfig` where the concept is the same. A field of TRL that cannot be
honoured yet is accepted at its neutral value, so that scripts run, and refused at any other.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from qlora_dpo.data import TokenLimits
from qlora_dpo.layouts import LAYOUTS
from qlora_dpo.losses import LOSSES, loss_parameters
from qlora_dpo.preferences import PAIR_STRATEGIES

BATCH_LAYOUTS = ("auto", *LAYOUTS)
REFERENCES = ("auto", "base", "none")

_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "truncation_mode": ("keep_start",),
    "pad_to_multiple_of": (None, "auto"),
    "precompute_ref_log_probs": (False,),
    "precompute_ref_batch_size": (None,),
    "loss_weights": (None, [1.0]),
    "ld_alpha": (None, 1.0),
    "f_divergence_type": ("reverse_kl",),
    "use_weighting": (False,),
    "sync_ref_model": (False,),
    "activation_offloading": (False,),
    "router_aux_loss_coef": (None, 0.0),
    "f_alpha_divergence_coef": (0.5,),
    "discopop_tau": (0.05,),
    "ref_model_mixup_alpha": (0.6,),
    "ref_model_sync_steps": (512,),
    "pad_token": (None,),
    "train_sampling_strategy": ("random", "sequential"),
    "label_smoothing_factor": (0.0,),
    "use_liger_kernel": (False,),
}
"""Fields that are not honoured, with the values that ask for nothing: TRL's, and some of TrainingArguments."""


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


def best_precision() -> str:
    """`bf16` where the device computes in it (a CPU does), else `fp16`."""
    return "fp16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16"


@dataclass
class QLoRADPOConfig(TrainingArguments):
    """Arguments of `QLoRADPOTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Defaults that differ from `TrainingArguments`, as in TRL: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on (`fp16` on a GPU without bf16). `use_cpu` is set where there is no
    accelerator. `logging_nan_inf_filter` is off: a loss that is not finite is shown, not hidden.

    `per_device_train_batch_size` counts groups: a prompt with all its completions and pairs.
    """

    learning_rate: float = field(default=1e-6, metadata=_help("The initial learning rate for AdamW."))
    logging_steps: float = field(
        default=10,
        metadata=_help("Log every X update steps; a number below 1 is a share of all steps."),
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Hide losses that are not finite from the log instead of showing them.")
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata=_help("Recompute activations in the backward pass instead of keeping them."),
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
        default_factory=lambda: ["sigmoid"], metadata=_help(f"The loss, one of {sorted(LOSSES)}.")
    )
    label_smoothing: float = field(
        default=0.0, metadata=_help("Probability that a label is flipped, in [0, 0.5); `sigmoid` takes it (cDPO).")
    )
    reference: str = field(
        default="auto",
        metadata=_help(
            f"What the policy is compared with, one of {REFERENCES}: the base model with its adapters disabled (`auto` "
            "picks it for a fresh adapter), or nothing.",
        ),
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
    dataset_num_proc: int | None = field(default=None, metadata=_help("Processes to tokenise the data with."))

    batch_layout: str = field(
        default="auto",
        metadata=_help(
            f"How tokens are placed in rows, one of {BATCH_LAYOUTS}. `auto`: `tree` (each prompt and completion once, "
            "no padding) if it proves equal to one row per completion on this model, else `padded`."
        ),
    )
    logps_chunk_size: int | None = field(
        default=None, metadata=_help("Positions whose logits exist at a time. None: as many as fill 64 MiB in fp32.")
    )
    padding_free: bool = field(
        default=False, metadata=_help("Never pad, as `tree` and `packed` do; refuses `batch_layout='padded'`.")
    )
    disable_dropout: bool = field(
        default=True, metadata=_help("Set every dropout probability of the model to zero, the adapter's too.")
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Keyword arguments of `from_pretrained`, for a model given as a string.")
    )
    trust_remote_code: bool = field(default=False, metadata=_help("Run Python code that a model repository ships."))

    truncation_mode: str = field(default="keep_start", metadata=_help("Only `keep_start`: cut at the end."))
    pad_to_multiple_of: int | str | None = field(default="auto", metadata=_help("Not built yet: only None or `auto`."))
    precompute_ref_log_probs: bool = field(default=False, metadata=_help("Not built yet."))
    precompute_ref_batch_size: int | None = field(default=None, metadata=_help("Not built yet."))
    loss_weights: list[float] | None = field(default=None, metadata=_help("Not built yet: one loss at a time."))
    ld_alpha: float | None = field(default=None, metadata=_help("Not built yet (LD-DPO)."))
    f_divergence_type: str = field(default="reverse_kl", metadata=_help("Not built yet: only `reverse_kl`."))
    use_weighting: bool = field(default=False, metadata=_help("Not built yet (WPO)."))
    sync_ref_model: bool = field(default=False, metadata=_help("Not built yet (TR-DPO)."))
    activation_offloading: bool = field(default=False, metadata=_help("Not built yet."))
    router_aux_loss_coef: float | None = field(
        default=None, metadata=_help("Not built yet: a mixture-of-experts model trains without its auxiliary loss.")
    )

    f_alpha_divergence_coef: float = field(default=0.5, metadata=_help("Not built yet."))
    discopop_tau: float = field(default=0.05, metadata=_help("Not built yet."))
    ref_model_mixup_alpha: float = field(default=0.6, metadata=_help("Not built yet (TR-DPO)."))
    ref_model_sync_steps: int = field(default=512, metadata=_help("Not built yet (TR-DPO)."))
    pad_token: str | None = field(default=None, metadata=_help("Set `tokenizer.pad_token` instead."))

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._set_device_and_precision()
        if getattr(self, "activation_checkpointing", False) is None:  # the newer name of the same field
            self.activation_checkpointing = self.gradient_checkpointing
        self._check()
        self._check_secrets()
        super().__post_init__()

    def _set_device_and_precision(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.fp16:
            raise ValueError("`fp16` must be False on a CPU, got True. Use bf16, or neither for fp32.")
        if self.bf16 is None:
            self.fp16 = bool(self.fp16) or best_precision() == "fp16"
            self.bf16 = not self.fp16

    def _check(self) -> None:
        """Refuse what cannot be right, with the way out."""
        for name, neutral in _NOT_BUILT.items():
            if getattr(self, name, neutral[0]) not in neutral:
                raise NotImplementedError(f"`{name}` must be {neutral[0]!r} for now, got {getattr(self, name)!r}.")
        if len(self.loss_type) != 1:
            raise NotImplementedError(f"`loss_type` must be one loss for now, got {self.loss_type}.")
        self._check_choice("loss_type", self.loss_type[0], tuple(LOSSES))
        self._check_choice("batch_layout", self.batch_layout, BATCH_LAYOUTS)
        self._check_choice("reference", self.reference, REFERENCES)
        self._check_choice("pair_strategy", self.pair_strategy, tuple(PAIR_STRATEGIES))
        if self.padding_free and self.batch_layout == "padded":
            raise ValueError("`padding_free` must be False with batch_layout='padded', got True. Drop one of them.")
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}. 0.1 is usual.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}. Use 0 for plain DPO.")
        if self.label_smoothing and "label_smoothing" not in loss_parameters(self.loss_type[0]):
            raise ValueError(
                f"`label_smoothing` must be 0 for loss_type='{self.loss_type[0]}', which does not use it, got "
                f"{self.label_smoothing}. Use loss_type='sigmoid'."
            )
        for name in ("max_length", "max_prompt_length", "logps_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, or None, got {value}.")

    def _check_secrets(self) -> None:
        """Refuse what would upload a token: Trainer writes its arguments beside a checkpoint that it pushes."""
        if self.push_to_hub and self.hub_token and HubStrategy(self.hub_strategy) is not HubStrategy.END:
            raise ValueError(
                "`hub_token` must be None when checkpoints are pushed, got one: it would be uploaded with them. Set "
                "HF_TOKEN or log in instead."
            )

    def _check_choice(self, name: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")

    @property
    def token_limits(self) -> TokenLimits:
        """The limits on lengths."""
        return TokenLimits(self.max_length, self.max_prompt_length)

    @property
    def loss_hyperparameters(self) -> dict[str, Any]:
        """What the chosen loss is called with, by name."""
        return {name: getattr(self, name) for name in loss_parameters(self.loss_type[0])}
