"""Callbacks of the trainer."""

from typing import Any

from transformers import TrainerCallback

from qlora_dpo.reference import AverageReference


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy every few steps (TR-DPO).

    Attributes:
        error: Largest relative error of a recompression in the last update.
    """

    def __init__(self, reference: AverageReference, every: int) -> None:
        self.reference, self.every = reference, every
        self.error = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update, every `every` steps."""
        if state.global_step % self.every == 0:
            self.error = self.reference.update()
