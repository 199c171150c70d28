"""Every group once per epoch on several processes: batches filled with groups that count nothing.

Processes must make the same number of steps, so a data set that does not divide is filled up. accelerate fills with
groups it has already dealt, which then count twice; these here have no pairs, so they add nothing to any sum.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import RandomSampler, Sampler

from qlora_dpo.layouts import GROUP_VALUES


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class FilledSampler(Sampler):
    """The order of another sampler, and the fillers behind it."""

    def __init__(self, sampler: Sampler, first: int, count: int, seed: int | None = None) -> None:
        if isinstance(sampler, RandomSampler):  # as accelerate replaces it, so that all processes shuffle alike
            sampler = SeedableRandomSampler(sampler.data_source, generator=torch.Generator(), data_seed=seed)
        self.sampler, self.fillers = sampler, range(first, first + count)

    def __len__(self) -> int:
        """Groups and fillers."""
        return len(self.sampler) + len(self.fillers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from self.fillers

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for another epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def _filler(row: dict[str, Any]) -> dict[str, Any]:
    """A group without pairs that is computed where there is nothing to compute: a few tokens of a genuine one."""
    few = {"prompt_ids": row["prompt_ids"][:1], "completion_ids": [row["completion_ids"][0][:2]], "pairs": []}
    if "ref_logps" in row:
        few["ref_logps"] = row["ref_logps"][:1]
    return row | {name: [] for name in GROUP_VALUES if name in row} | few


def with_fillers(dataset: Dataset, multiple: int) -> Dataset:
    """Tokenised groups, filled up to a multiple."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    fillers = Dataset.from_list([_filler(dataset[0])] * missing, features=dataset.features)
    return concatenate_datasets([dataset, fillers])


class FilledStream(TorchIterableDataset):
    """A stream of tokenised groups in whole multiples: filled up at its end, or cut there.

    Every process goes through all of it and takes its part of each multiple. accelerate would give processes shards of
    the stream instead, which end at different steps, count their rows alike, and repeat their first groups at the end.
    """

    def __init__(self, stream: IterableDataset, multiple: int, cut: bool) -> None:
        self.stream, self.multiple, self.cut = stream, multiple, cut

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: list[dict[str, Any]] = []
        for row in self.stream:
            waiting.append(row)
            if len(waiting) == self.multiple:
                yield from waiting
                waiting = []
        if waiting and not self.cut:
            yield from [*waiting, *[_filler(waiting[0])] * (self.multiple - len(waiting))]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for another epoch."""
        self.stream.set_epoch(epoch)


def filled(
    dataset: Dataset, sampler_fn: Callable[[Any], Sampler], multiple: int, seed: int | None
) -> tuple[Dataset, Sampler]:
    """A data set filled up to a multiple, and the sampler that deals its fillers last.

    Args:
        dataset: Tokenised groups.
        sampler_fn: Makes the sampler of the genuine ones.
        multiple: Groups that all processes deal at a time.
        seed: `data_seed`.
    """
    whole = with_fillers(dataset, multiple)
    return whole, FilledSampler(sampler_fn(dataset), len(dataset), len(whole) - len(dataset), seed)
