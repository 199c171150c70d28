"""Exact evaluation: the numbers of every pair, kept until the data set is through."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.metrics import COLUMNS, summarize


class PairRecords:
    """Rows of the pair table by data-set row, pair number, and how often this process has seen that pair.

    A pair that two processes scored, because the last batch was filled up, counts once. Rows of a stream may share a
    number (each worker of a loader counts its own), so within a process every pair counts.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []
        self._keys: list[tuple[int, int, int]] = []
        self._seen: Counter[tuple[int, int]] = Counter()

    def add(self, table: Tensor, rows: list[int], pair_ids: list[int]) -> None:
        """Keep a table of pairs (`COLUMNS`, perhaps `SIDES` behind them) with their data-set rows and numbers."""
        self._tables.append(table)
        for pair in zip(rows, pair_ids, strict=True):
            self._keys.append((*pair, self._seen[pair]))
            self._seen[pair] += 1

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

    def __init__(self, values: dict[tuple[int, int, int], Any]) -> None:
        self._keys = list(values)
        self._table = np.stack(list(values.values())) if values else np.empty((0, len(COLUMNS)))

    def __len__(self) -> int:
        """Groups with a pair."""
        return len({(row, seen) for row, _, seen in self._keys})

    def column(self, name: str) -> np.ndarray:
        """`(T,)` values of a column of the pair table, fp64."""
        return self._table[:, COLUMNS.index(name)]

    def sides(self) -> np.ndarray:
        """`(T, len(SIDES))`, if they were kept."""
        return self._table[:, len(COLUMNS) :]

    def rows(self) -> np.ndarray:
        """`(T,)` data-set row of each pair."""
        return np.array([row for row, *_ in self._keys])

    def metrics(self) -> dict[str, float]:
        """Log keys over all pairs."""
        sums = dict(zip(COLUMNS, self._table[:, : len(COLUMNS)].sum(0).tolist(), strict=True))
        return summarize(sums, len(self._table))
