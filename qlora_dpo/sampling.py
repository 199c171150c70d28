"""Every group once per epoch on several processes: batches filled with groups that count nothing.

Processes must make the same number of steps, so a data set that does not divide is filled up. accelerate fills with
groups it has already dealt, which then count twice; these here have no pairs, so they add nothing to any sum.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
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


def with_fillers(dataset: Dataset, multiple: int) -> Dataset:
    """Tokenised groups, filled up to a multiple with copies of the first one that have no pairs."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    filler = {**dataset[0], "pairs": []} | {name: [] for name in GROUP_VALUES if name in dataset.column_names}
    if "ref_logps" in filler:
        filler["ref_logps"] = dataset[0]["ref_logps"]
    return concatenate_datasets([dataset, Dataset.from_list([filler] * missing, features=dataset.features)])


def filled(
    dataset: Any, sampler_fn: Callable[[Any], Sampler], multiple: int, seed: int | None
) -> tuple[Dataset, Sampler]:
    """A data set filled up to a multiple, and the sampler that deals its fillers last.

    Args:
        dataset: Tokenised groups.
        sampler_fn: Makes the sampler of the genuine ones.
        multiple: Groups that all processes deal at a time.
        seed: `data_seed`.

    Raises:
        ValueError: For a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "A stream must be trained on with dataloader_drop_last=True by several processes, got False: its last "
            "batch would be filled up with groups that then count twice. Set it, or use a data set of known length."
        )
    whole = with_fillers(dataset, multiple)
    return whole, FilledSampler(sampler_fn(dataset), len(dataset), len(whole) - len(dataset), seed)
