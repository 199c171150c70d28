"""What a script for TRL's trainer does beside its constructor: attributes, overridden methods, callbacks.

What has a meaning here is honoured; what would have no effect is refused by name, with what to use instead.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from qlora_dpo.losses import check_range

_OPTIONS = {
    "loss_type": "`loss_type`",
    "loss_types": "`loss_type`",
    "loss_weights": "`loss_weights`",
    "label_smoothing": "`label_smoothing`",
    "ld_alpha": "`ld_alpha`",
    "f_divergence_type": "`f_divergence_type`",
    "f_alpha_divergence_coef": "`f_alpha_divergence_coef`",
    "use_weighting": "`use_weighting`",
    "precompute_ref_logps": "`precompute_ref_log_probs`",
    "padding_free": "`padding_free`",
    "router_aux_loss_coef": "`router_aux_loss_coef`",
    "aux_loss_enabled": "`router_aux_loss_coef`",
}
"""Attributes of TRL's trainer that tell an option, and the field of the configuration that sets it."""

_LOSS = (
    "the loss is of all pairs of a step, and logs and evaluations are made from those pairs",
    "Add a loss of your own to `qlora_dpo.LOSSES` and name it in `loss_type`; for a term of the weights, add its "
    "gradient in a callback's `on_pre_optimizer_step`.",
)
_DATA = ("rows are tokenised elsewhere", "Map the data set before you pass it.")
_REFERENCE = ("the reference is scored elsewhere", "Set `reference`, pass `ref_model`, or add a column `ref_logps`.")
_LOGGED = ("the log is made from all pairs since its last line", "Override `log`, or pass `compute_metrics`.")
_EVALUATED = (
    "evaluations are made from the pairs themselves, and what it returns would be dropped",
    "Pass `compute_metrics`, or use a callback's `on_prediction_step`.",
)
_ANSWERS = ("answers are written elsewhere", "Set `sample_generations`.")
_OVERRIDDEN = {
    **dict.fromkeys(("compute_loss", "_compute_loss", "_compute_loss_liger", "dpo_loss"), _LOSS),
    **dict.fromkeys(("get_batch_loss_metrics", "get_batch_logps", "_get_batch_logps", "concatenated_forward"), _LOSS),
    **dict.fromkeys(("_prepare_dataset", "tokenize_row", "process_row", "build_tokenized_answer"), _DATA),
    **dict.fromkeys(("tokenize_batch_element", "concatenated_inputs"), _DATA),
    **dict.fromkeys(("compute_ref_log_probs", "compute_reference_log_probs", "_precompute_ref_logps"), _REFERENCE),
    **dict.fromkeys(("null_ref_context",), _REFERENCE),
    **dict.fromkeys(("store_metrics",), _LOGGED),
    **dict.fromkeys(("prediction_step",), _EVALUATED),
    **dict.fromkeys(("generate_from_model_and_ref",), _ANSWERS),
}
"""Methods of `Trainer` and of TRL's trainer, now and earlier, that an override would not change: why, and a way out."""

_CALLBACKS = {
    "LogCompletionsCallback": "Set `sample_generations`.",
    "WeaveCallback": "Set `sample_generations`.",
    "WinRateCallback": "Set `sample_generations`.",
    "SyncRefModelCallback": "Set `sync_ref_model`.",
}
"""Callbacks of TRL that need its rows of text or its reference, and what to use instead."""


def check_overrides(kind: type) -> None:
    """Refuse a trainer of which something is overridden that is not called, or whose result would be dropped.

    Args:
        kind: The class of the trainer that is built: a subclass, or the library's own with something put in its place.

    Raises:
        NotImplementedError: For such a method, or an option as an attribute of the class.
    """
    for name in (*_OVERRIDDEN, *_OPTIONS, "beta", "ref_model"):
        found = getattr(kind, name, None)
        ours = vars(TrlNames).get(name)
        if found is ours or (ours is None and _is_of_this_package(found)):
            continue
        setting = _OPTIONS.get(name, f"`{name}`")
        reason, way_out = _OVERRIDDEN.get(name, ("options are read from the configuration", f"Set {setting} there."))
        raise NotImplementedError(f"`{name}` must not be overridden, got {kind.__name__}.{name}: {reason}. {way_out}")


def _is_of_this_package(method: Any) -> bool:
    """Whether a method was written here."""
    return str(getattr(method, "__module__", "")).split(".")[0] == __package__


def check_callbacks(callbacks: Iterable[TrainerCallback | type[TrainerCallback]] | None) -> None:
    """Refuse callbacks of TRL that cannot work here.

    Raises:
        NotImplementedError: If there is one.
    """
    for callback in callbacks or []:
        kind = callback if isinstance(callback, type) else type(callback)
        for parent in kind.__mro__:
            if parent.__module__.split(".")[0] == "trl" and parent.__name__ in _CALLBACKS:
                raise NotImplementedError(
                    f"`callbacks` must be without TRL's {parent.__name__}, which needs TRL's own data and reference, "
                    f"got one. {_CALLBACKS[parent.__name__]}"
                )


class TrlNames:
    """The attributes by which TRL's trainer tells its options: `beta` to read and set, the others to read.

    Attributes:
        beta: Strength of the pull to the reference, from the next forward on; also the factor of the logged rewards.
    """

    args: Any
    step: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any object, but for what would have no effect.

        Raises:
            AttributeError: For an option that is read once, and for `ref_model`.
            NotImplementedError: For a method that is not called.
        """
        if name in _OPTIONS:
            raise AttributeError(
                f"`{name}` must not be set on the trainer, which has read it already, got {value!r}. Set "
                f"{_OPTIONS[name]} in QLoRADPOConfig and build the trainer anew."
            )
        if name == "ref_model":
            raise AttributeError(
                f"`ref_model` must not be set on the trainer, got {type(value).__name__}. Pass it to the constructor."
            )
        if name in _OVERRIDDEN:
            reason, way_out = _OVERRIDDEN[name]
            raise NotImplementedError(f"`{name}` must not be replaced, got {value!r}: {reason}. {way_out}")
        super().__setattr__(name, value)

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference, > 0."""
        return float(self.step.beta)

    @beta.setter
    def beta(self, value: float) -> None:
        check_range("beta", value)
        values = {**self.step.objective.hyperparameters, "beta": value}
        self.step.objective, self.step.beta = replace(self.step.objective, hyperparameters=values), value

    @property
    def ref_model(self) -> Any:
        """The model that is the reference; None where it is the policy's own start, an adapter, or nothing."""
        reference = getattr(self.step.reference, "live", self.step.reference)
        return getattr(reference, "model", None)

    @property
    def loss_type(self) -> list[str]:
        """Names of the losses."""
        return list(self.step.objective.losses)

    loss_types = loss_type

    @property
    def loss_weights(self) -> list[float]:
        """Factor of each loss."""
        return list(self.step.objective.weights)

    @property
    def label_smoothing(self) -> float:
        """Probability that a label is flipped."""
        return float(self.args.label_smoothing)

    @property
    def ld_alpha(self) -> float | None:
        """Factor of tokens beyond the shorter side of a pair."""
        return self.step.objective.ld_alpha

    @property
    def f_divergence_type(self) -> str:
        """Divergence from the reference."""
        return str(self.step.objective.f_divergence_type)

    @property
    def f_alpha_divergence_coef(self) -> float:
        """Coefficient of the alpha-divergence."""
        return float(self.step.objective.f_alpha_divergence_coef)

    @property
    def use_weighting(self) -> bool:
        """Whether pairs are weighted by how likely the policy is to write them."""
        return bool(self.step.objective.use_weighting)

    @property
    def precompute_ref_logps(self) -> bool:
        """Whether the reference is computed before training."""
        return bool(self.args.precompute_ref_log_probs)

    @property
    def padding_free(self) -> bool:
        """Whether rows are never padded."""
        return bool(self.args.padding_free)

    @property
    def router_aux_loss_coef(self) -> float:
        """Factor of a mixture of experts' load-balancing loss."""
        return float(self.step.router_aux_loss_coef)

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether there is such a loss."""
        return self.router_aux_loss_coef != 0
