"""Every group once per epoch on several processes: batches filled with groups that count nothing.

Processes must make the same number of steps, so a data set that does not divide is filled up. accelerate fills with
groups it has already dealt, which then count twice; these here have no pairs, so they add nothing to any sum.
"""

from collections.abc import Iterator

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import RandomSampler, Sampler

from qlora_dpo.layouts import GROUP_VALUES


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
