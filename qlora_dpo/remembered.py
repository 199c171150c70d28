"""What a reference said of a batch, in CPU memory: the evaluations of a training ask for the same again and again.

A reference that stays as it is says the same of the same forward to the last bit, so nothing that is evaluated changes.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

Said = dict[str, Tensor]
"""What a reference returns, by name."""


class Remembered:
    """The reference's scores of batches, up to a number of bytes; what is beyond them is computed each time.

    Args:
        most_bytes: Of CPU memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._left, self._kept = most_bytes, dict[bytes, Said]()

    def of(self, batch: dict[str, Any], asked: Any, compute: Callable[[], Said]) -> Said:
        """The scores of a batch, computed if it is the first of its kind.

        Args:
            batch: What `layouts.make_batch` returns.
            asked: What the scores depend on beside the batch.
            compute: Gives them.
        """
        key = _key(batch, asked)
        if key in self._kept:
            device = batch["yw_idxs"].device
            return {name: value.to(device, non_blocking=True) for name, value in self._kept[key].items()}
        scores = compute()
        size = sum(value.nbytes for value in scores.values())
        if size <= self._left:
            self._left -= size
            self._kept[key] = {name: value.detach().cpu() for name, value in scores.items()}
        return scores


def _key(batch: dict[str, Any], asked: Any) -> bytes:
    """The same for the same completions in the same forwards: others are rounded otherwise."""
    forwards = [
        (tuple(part["input_ids"].shape), part["segments"] is None, part["lengths"])
        for part in batch.get("parts", [batch])
    ]
    return hashlib.sha256(repr((forwards, batch["keys"], asked)).encode()).digest()
