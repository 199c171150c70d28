"""Callbacks of the trainer: a reference that follows, layers that keep activations, and warnings about a log."""

import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from qlora_dpo.recompute import decoder_layers
from qlora_dpo.reference import AverageReference

PATIENCE = 3
"""Log lines that must show the same before it is said."""
SURELY = 3.0
"""Standard errors by which a key must have moved: each line is of other pairs."""
_ACCURACY = re.compile(r"eval_(?:(?P<set>.*)_)?rewards/accuracies", re.DOTALL)


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy every few steps (TR-DPO)."""

    def __init__(self, reference: AverageReference, every: int) -> None:
        self.reference, self.every = reference, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update, every `every` steps."""
        if state.global_step % self.every == 0:
            self.reference.update()


class KeepLayers(TrainerCallback):
    """Lets the last decoder layers keep their activations: anew in each training, which lets all layers recompute.

    Attributes:
        layers: The decoder's layers.
        count: How many of them are kept; more than there are is all.
    """

    def __init__(self, model: Any, count: int = 0) -> None:
        self.layers, self.count = decoder_layers(model), count
        self._recomputing: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After `Trainer` has turned checkpointing on, and before the first forward."""
        self.begin()

    def begin(self) -> None:
        """Take note of the layers that recompute as checkpointing set them, and let the last ones keep instead."""
        self._recomputing = [bool(layer.gradient_checkpointing) for layer in self.layers]
        self.count = min(self.count, len(self.layers))
        self._set()

    def keep_fewer(self) -> bool:
        """Keep half as many, to give memory back; returns whether any was kept."""
        if not self.count:
            return False
        self.count //= 2
        self._set()
        return True

    def _set(self) -> None:
        for number, (layer, recomputing) in enumerate(zip(self.layers, self._recomputing, strict=True)):
            layer.gradient_checkpointing = recomputing and number < len(self.layers) - self.count  # type: ignore[assignment]


def troubles(
    history: Sequence[Mapping[str, float]], loss_scaled: bool = False, referenced: bool = True
) -> dict[str, str]:
    """What a log shows that a person should know, by name.

    Args:
        history: Lines of `trainer.state.log_history`, oldest first.
        loss_scaled: Whether the loss is scaled for fp16. A step whose gradient overflows is then left out, and the next
            one has a smaller scale, until it fits: one line with such a norm says nothing.
        referenced: Whether rewards are relative to a reference. Without one, whether they fall is not to be seen among
            what the pairs of one line and of the next differ by.

    Returns:
        A sentence with a remedy by name: `grad_norm_not_finite`, `chosen_falls`, `ties`, `overfitting`.
    """
    lines = [line for line in history if "rewards/margins" in line]
    found = {}
    norms = [line.get("grad_norm", 0.0) for line in lines[-(PATIENCE if loss_scaled else 1) :]]
    if len(norms) == (PATIENCE if loss_scaled else 1) and not any(map(math.isfinite, norms)):
        found["grad_norm_not_finite"] = (
            f"The gradient's norm is {lines[-1]['grad_norm']} at step {lines[-1].get('step')}: the run is lost from "
            "here. Lower the learning rate, or compute in bf16 instead of fp16."
        )
    last = lines[-PATIENCE:]
    parting = bool(last) and last[-1]["rewards/chosen"] < 0 < last[-1]["rewards/margins"]
    falls, grow = _moved(lines, "rewards/chosen") < -SURELY, _moved(lines, "rewards/margins") > SURELY
    if referenced and parting and falls and grow:
        found["chosen_falls"] = (
            f"Chosen log-probabilities fall (rewards/chosen {last[-1]['rewards/chosen']:.3g}) while margins grow: the "
            "policy learns to make both sides unlikely. Mix in the likelihood (loss_type=['sigmoid', 'sft']), use "
            "'apo_zero' or 'dpop', or lower the learning rate."
        )
    if len(lines) > PATIENCE and all(line["rewards/ties"] > 0.5 for line in last):
        found["ties"] = (
            "More than half of the pairs still tie: the adapter hardly moves. Raise the learning rate, or check that "
            "its weights are trained."
        )
    seen = sum(line["rewards/accuracies"] for line in last) / PATIENCE
    for name, evaluated in _evaluated(history).items() if len(last) == PATIENCE else ():
        if len(evaluated) > 1 and seen - evaluated[-1] > 0.2:
            found["overfitting"] = (
                f"Accuracy is {seen:.2f} in training and {evaluated[-1]:.2f} in evaluation{name and f' on {name}'}, at "
                f"best {max(evaluated):.2f}: stop earlier (load_best_model_at_end), raise beta, or add data."
            )
    return found


def _evaluated(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The accuracies of the evaluations, oldest first, by the name of their set."""
    found: dict[str, list[float]] = {}
    for line in history:
        for key, value in line.items():
            if match := _ACCURACY.fullmatch(key):
                found.setdefault(match["set"] or "", []).append(value)
    return found


def _moved(lines: Sequence[Mapping[str, float]], key: str) -> float:
    """How far a key is in the last third of a log from where it was in the first, in standard errors of the two means.

    >>> lines = [{"reward": value} for value in (0, 1, 2, 0, 0, 0, 4, 5, 6)]
    >>> round(_moved(lines, "reward"), 4)  # 5 - 1, over the root of 1 / 3 + 1 / 3
    4.899
    """
    third = len(lines) // 3
    if third < PATIENCE:
        return 0.0
    first, last = ([line[key] for line in some] for some in (lines[:third], lines[-third:]))
    rose = statistics.mean(last) - statistics.mean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    return rose / error if error else rose * math.inf if rose else 0.0


class WatchPreferences(TrainerCallback):
    """Warns once of each of the `troubles` that the log shows."""

    def __init__(self, referenced: bool) -> None:
        """Whether the log's rewards are relative to a reference."""
        self.referenced = referenced
        self.said: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the log so far."""
        if not state.is_world_process_zero:
            return
        for name, sentence in troubles(state.log_history, args.fp16, self.referenced).items():
            if name not in self.said:
                self.said.add(name)
                warnings.warn(f"{name}: {sentence}", stacklevel=2)
