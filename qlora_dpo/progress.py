"""Progress bars that show accuracy and margin beside the loss, in a terminal and in a notebook."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

NAMES = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""What is shown, by its key in the log."""


def shown(logs: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The numbers of a log line that a progress bar has room for.

    Args:
        logs: Values by key.
        prefix: What comes before the keys, such as `eval_`.
    """
    values = {name: logs[prefix + key] for key, name in NAMES.items() if prefix + key in logs}
    return {name: f"{value:.3g}" for name, value in values.items() if not math.isnan(value)}


class PreferenceProgress(ProgressCallback):
    """`Trainer`'s progress bar with the last loss, accuracy and margin at its end, an evaluation's too."""

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._numbers: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line as ever, and its numbers at the end of the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        evaluated = {f"eval {name}": value for name, value in shown(logs, "eval_").items()}
        self._numbers |= shown(logs) | evaluated
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._numbers)


def notebook_progress(own: type[TrainerCallback]) -> type[TrainerCallback]:
    """`Trainer`'s notebook table with accuracy and margin in it, instead of nothing or a column for every metric.

    Args:
        own: `Trainer`'s class, which only a notebook can import.
    """

    class NotebookPreferenceProgress(own):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if args.eval_strategy == IntervalStrategy.NO and "loss" in logs:
                values = {"Training Loss": logs["loss"]}
                values |= {name.capitalize(): value for name, value in shown(logs).items() if name != "loss"}
                self.training_tracker.write_line({"Step": state.global_step, **values})

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            few = {
                key.removesuffix(ending) + name: value
                for key, value in (metrics or {}).items()
                for ending, name in NAMES.items()
                if key.endswith("_" + ending) and not key.endswith("aux_loss")
            }
            super().on_evaluate(args, state, control, metrics=few, **kwargs)

    return NotebookPreferenceProgress


def with_preferences(callback: TrainerCallback) -> TrainerCallback:
    """The same callback, or in place of `Trainer`'s own progress bar one that knows preferences."""
    if type(callback) is ProgressCallback:
        return PreferenceProgress(callback.max_str_len)
    if type(callback).__name__ == "NotebookProgressCallback":
        return notebook_progress(type(callback))()
    return callback
