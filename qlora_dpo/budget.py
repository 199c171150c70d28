"""When memory runs out: the optimizer step again with fewer activations kept, or half the tokens in a forward."""

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from pyarrow import compute

from qlora_dpo.errors import OutOfMemoryError, is_out_of_memory
from qlora_dpo.layouts import GroupCollator

T = TypeVar("T")


def forwards_of(samples: Sequence[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """Positions of every forward of some micro-batches, and the data-set rows of the piece it belongs to."""
    return [
        (part["input_ids"].numel(), sorted(set(piece["rows"])))
        for sample in samples
        for piece in sample["pieces"]
        for part in piece.get("parts", [piece])
    ]


class Rescue:
    """Repeats an optimizer step with fewer activations kept, then with half the token budget while that cuts forwards.

    The gradient stays the same.

    The micro-batches of a step are computed one after the other; when one runs out of memory, those before it have
    left gradients, and so has a part of its own backward pass. So the whole step starts again.

    Args:
        collator: Whose budget is halved, for the rest of the run.
        restart: Puts everything back to how it was before the step.
        give_up: Called before the last error is raised.
        keep_fewer: Gives back memory that was used to save time; returns whether there was any.
        alone: Whether no other process takes part; those would wait for this one's gradient.
    """

    def __init__(
        self,
        collator: GroupCollator,
        restart: Callable[[], None] = lambda: None,
        give_up: Callable[[], None] = lambda: None,
        keep_fewer: Callable[[], bool] = lambda: False,
        alone: bool = True,
    ) -> None:
        self.collator, self.restart, self.give_up, self.alone = collator, restart, give_up, alone
        self.keep_fewer = keep_fewer
        self.samples: list[dict[str, Any]] = []

    def begin(self, samples: list[dict[str, Any]]) -> None:
        """Take the micro-batches of the next step; those that were cut by an older budget are cut anew."""
        self.samples = samples
        for sample in samples:
            self._cut(sample)

    def run(self, work: Callable[[], T], before: Callable[[], None] = lambda: None) -> T:
        """The result of some work of the step, repeated from the step's start where memory runs out.

        Args:
            work: Computes on `samples` as they are when it is called.
            before: The work of the step that came before, to be repeated first.

        Raises:
            OutOfMemoryError: If no forward can be cut any further.
        """
        failed = ""
        while True:
            try:
                if failed:
                    self.restart()
                    before()
                return work()
            except (RuntimeError, MemoryError) as error:
                if not (self.alone and is_out_of_memory(error)):
                    raise
                failed = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._ease(failed)  # not in the handler, where the error still holds the tensors of the forward

    def _ease(self, failed: str) -> None:
        """Keep the activations of fewer layers; where none are kept, half the largest forward, if that cuts it."""
        gc.collect()  # what the error's traceback held in a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens, rows = max(forwards_of(self.samples))
        if self.keep_fewer():
            warnings.warn(
                f"Memory ran out on a forward of {tokens:,} tokens (row {', '.join(map(str, rows))} of the data); the "
                "step is done again with fewer layers kept, and the run goes on with that.",
                stacklevel=2,
            )
            for sample in self.samples:
                sample.update(self.collator.place(sample["groups"]))  # without what a first stage left in it
            return
        self.collator.max_tokens = max(1, tokens // 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a completion that is beyond the budget by itself
            for sample in self.samples:
                self._cut(sample)
        if max(forwards_of(self.samples))[0] >= tokens:
            self.give_up()
            raise OutOfMemoryError(
                f"Memory ran out on a forward of {tokens:,} tokens, one prompt with one completion (row "
                f"{', '.join(map(str, rows))} of the data), got: {failed}. Lower `max_length`; `qlora-dpo plan` says "
                "what each option saves."
            )
        warnings.warn(
            f"Memory ran out on a forward of {tokens:,} tokens (row {', '.join(map(str, rows))} of the data); the step "
            f"is done again with max_tokens_per_forward={self.collator.max_tokens}, and the run goes on with that.",
            stacklevel=2,
        )

    def _cut(self, sample: dict[str, Any]) -> None:
        """The pieces of a micro-batch by the budget as it is now."""
        if sample["max_tokens"] != self.collator.max_tokens:
            sample.update(self.collator.place(sample["groups"]))


def longest_rows(dataset: Dataset, count: int) -> list[int]:
    """Indices of the tokenised rows with the most tokens, prompt and completions, longest first."""
    sizes: list[int] = []
    for table in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        prompts = compute.list_value_length(table["prompt_ids"]).to_numpy()
        completions = table["completion_ids"].combine_chunks()
        tokens = compute.list_value_length(completions.flatten()).to_numpy()
        owners = compute.list_parent_indices(completions).to_numpy()
        sizes += (prompts + np.bincount(owners, tokens, minlength=len(prompts)).astype(int)).tolist()
    return sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count]
