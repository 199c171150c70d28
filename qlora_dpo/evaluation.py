"""Exact evaluation: the numbers of every pair, kept until the data set is through."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.measures import accuracy_estimate
from qlora_dpo.metrics import COLUMNS, summarize


class PairRecords:
    """Rows of the pair table by data-set row, pair number, the tokens of the pair, and those of its prompt.

    A pair that was scored twice, because the last batch of a process was filled up, counts once. Rows of a stream may
    share a number (each shard and each worker of a loader counts its own): their tokens tell them apart.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []
        self._keys: list[tuple[int, int, str, str]] = []

    def add(self, table: Tensor, batch: dict[str, Any]) -> None:
        """Keep the `(T, len(COLUMNS))` table of a batch's pairs, perhaps with `len(SIDE_COLUMNS)` columns more."""
        self._tables.append(table)
        sides = zip(batch["yw_idxs"].tolist(), batch["yl_idxs"].tolist(), strict=True)
        tokens = [batch["keys"][w] + batch["keys"][l] for w, l in sides]
        self._keys += zip(batch["rows"], batch["pair_ids"], tokens, batch["prompts"], strict=True)

    def gathered(self) -> "GatheredPairs":
        """The records of all processes, each pair once, in data-set order."""
        table = torch.cat(self._tables).cpu().numpy() if self._tables else np.empty((0, len(COLUMNS)))
        parts = [(self._keys, table)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [parts[0]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, (self._keys, table))
        values = {key: row for keys, rows in parts for key, row in zip(keys, rows, strict=True)}
        return GatheredPairs({key: values[key] for key in sorted(values)})


class GatheredPairs:
    """Every pair of a data set once."""

    def __init__(self, values: dict[tuple[int, int, str, str], Any]) -> None:
        self._keys = list(values)
        self._table = np.stack(list(values.values())) if values else np.empty((0, len(COLUMNS)))

    def __len__(self) -> int:
        """Data-set rows with a pair."""
        return len({row for row, *_ in self._keys})

    def column(self, name: str) -> np.ndarray:
        """`(T,)` values of a column of the pair table, fp64."""
        return self._table[:, COLUMNS.index(name)]

    def sides(self) -> np.ndarray:
        """`(T, len(SIDE_COLUMNS))`, if they were kept."""
        return self._table[:, len(COLUMNS) :]

    def pair_ids(self) -> np.ndarray:
        """`(T,)` number of each pair within its row."""
        return np.array([number for _, number, *_ in self._keys])

    def rows(self) -> np.ndarray:
        """`(T,)` data-set row of each pair."""
        return np.array([row for row, *_ in self._keys])

    def prompts(self) -> np.ndarray:
        """`(T,)` names of the prompts: what pairs, also of several rows, share, so that they are not independent."""
        return np.array([prompt for *_, prompt in self._keys])

    def evaluation(self) -> dict[str, Any]:
        """Pairs, groups, ties, accuracy with its interval and mean margin; empty without pairs or with a NaN."""
        margins = self.column("reward_chosen") - self.column("reward_rejected")
        if not len(margins) or not np.isfinite(margins).all():
            return {}
        found = {"pairs": len(margins), "groups": len(self), "ties": float((margins == 0).mean())}
        accuracy = accuracy_estimate(margins, self.prompts())
        return found | {"accuracy": asdict(accuracy), "margin": math.fsum(margins.tolist()) / len(margins)}

    def metrics(self) -> dict[str, float]:
        """Log keys over all pairs."""
        sums = dict(zip(COLUMNS, self._table[:, : len(COLUMNS)].sum(0).tolist(), strict=True))
        return summarize(sums, len(self._table))
