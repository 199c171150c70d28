"""Rows with one prompt as one group, so that the prompt and what the rows share are computed once.

A pair's loss stays what it was. Which pairs make a step changes, as a batch counts groups.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from datasets import Dataset

_OF_PAIRS = ("weights", "label_probs", "offsets")


def merge_prompts(groups: Dataset) -> Dataset:
    """Tokenised rows, those of one prompt put together where the first of them stands.

    Args:
        groups: What `data.prepare_dataset` makes of rows.

    Returns:
        The same columns; `row`, `subset` and `turns` are those of the first row. A completion that several rows have is
        there once, unless they give it different `ref_logps`.
    """
    plain = groups.with_format(None)
    places: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(plain["prompt_ids"]):
        places.setdefault(_digest(prompt), []).append(place)
    if len(places) == len(groups):
        return groups
    together = list(places.values())
    return plain.select([of_one[0] for of_one in together]).map(
        _merged,
        with_indices=True,
        fn_kwargs={"groups": plain, "together": together},
        features=groups.features,
        desc="Merging prompts",
    )


def _merged(first: dict[str, Any], index: int, groups: Dataset, together: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The group of the rows that belong to a first one."""
    if len(together[index]) == 1:
        return first
    rows = [groups[place] for place in together[index]]
    known: dict[tuple[tuple[int, ...], float | None], int] = {}
    pairs = []
    for row in rows:
        given = row.get("ref_logps") or [None] * len(row["completion_ids"])
        completions = zip(map(tuple, row["completion_ids"]), given, strict=True)
        number = [known.setdefault(completion, len(known)) for completion in completions]
        pairs += [[number[w], number[l]] for w, l in row["pairs"]]
    merged = first | {"completion_ids": [list(ids) for ids, _ in known], "pairs": pairs}
    if "ref_logps" in first:
        merged["ref_logps"] = [logp for _, logp in known]
    return merged | {name: [value for row in rows for value in row[name]] for name in _OF_PAIRS if name in first}


def tokens_once(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> int:
    """Tokens that rows place where each prompt, and each completion behind it, is there once.

    The last token of a completion predicts nothing and is not placed.

    >>> tokens_once([[5, 6], [5, 6]], [[[1, 2], [3]], [[1, 2], [4, 4, 4]]])  # 2 + 1 + 0 + 2
    5
    """
    total, behind = 0, dict[bytes, set[bytes]]()
    for prompt, several in zip(prompts, completions, strict=True):
        digest = _digest(prompt)
        total += 0 if digest in behind else len(prompt)
        known = behind.setdefault(digest, set())
        for ids in several:
            if (digest := _digest(ids)) not in known:
                known.add(digest)
                total += len(ids) - 1
    return total


def _digest(ids: Sequence[int]) -> bytes:
    """What tells tokens from others, in a few bytes: those of a large data set do not fit in memory as numbers."""
    return sha256(array("q", ids)).digest()
