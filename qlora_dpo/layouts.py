"""Placing groups of token ids in rows, and saying which position predicts which token.

A group is one prompt, its K >= 2 completions and its pairs. A batch is a plain dict that holds the tokens of several
groups; what follows from a batch never depends on the layout:

- `tree`: one row; each prompt once, its completions behind it;
- `packed`: one row; prompt + completion sequences end to end;
- `padded`: one right-padded row per completion, the slow truth.

Legend: B completions, T pairs, N scored tokens (all completions' tokens), R rows of L positions.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_dpo.cache import completion_key
from qlora_dpo.preferences import PAIR_VALUES

LAYOUTS = ("tree", "packed", "padded")

GROUP_VALUES = ("weights", "label_probs", "offsets", "ref_logps")
"""Numbers that a group may have for each of its pairs or completions."""


@dataclass(frozen=True)
class Group:
    """One prompt, its completions and the pairs between them, as token ids.

    Attributes:
        prompt_ids: The prompt's tokens, at least one.
        completion_ids: K >= 2 completions of at least one token each.
        pairs: `(chosen, rejected)` indices into the completions.
        row: Index of the data-set row it came from.
        weights: Factor of each pair's loss; None for 1.
        label_probs: Probability of each pair's label; None for 1.
        offsets: Margin that each pair's rewards should have; None without.
        ref_logps: Given reference log-probability of each completion, in nats; None without.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int]]
    row: int = 0
    weights: Sequence[float] | None = None
    label_probs: Sequence[float] | None = None
    offsets: Sequence[float] | None = None
    ref_logps: Sequence[float] | None = None


@dataclass(frozen=True)
class Segment:
    """A run of queries in a row and the keys it sees: an earlier run (its prompt) and, causally, itself.

    Not a tuple: Trainer and accelerate take tuples apart and put them together again.

    Attributes:
        start: First position of the run.
        length: Positions in the run.
        prefix_start: First position of the earlier run.
        prefix_length: Its length; 0 if the run is a sequence of its own.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass
class _Rows:
    """Rows under construction."""

    input_ids: list[list[int]] = field(default_factory=lambda: [[]])
    position_ids: list[list[int]] = field(default_factory=lambda: [[]])
    predictors: list[tuple[int, int]] = field(default_factory=list)  # (row, position), N of them
    segments: list[Segment] = field(default_factory=list)

    def add(self, ids: Sequence[int], first_position: int, row: int = 0) -> int:
        """Append tokens to a row; returns where they start in it."""
        while len(self.input_ids) <= row:
            self.input_ids.append([])
            self.position_ids.append([])
        start = len(self.input_ids[row])
        self.input_ids[row].extend(ids)
        self.position_ids[row].extend(range(first_position, first_position + len(ids)))
        return start


def _predict(rows: _Rows, row: int, prompt_end: int, start: int, length: int) -> None:
    """Record what predicts a completion: its first token, the prompt's last position; each other, the one before.

    This is the only place that knows of the shift by one. A completion's last token predicts nothing, so no layout
    places it.
    """
    rows.predictors.append((row, prompt_end - 1))
    rows.predictors.extend((row, start + offset) for offset in range(length - 1))


def _tree(groups: Sequence[Group]) -> _Rows:
    rows = _Rows()
    for group in groups:
        prompt_length = len(group.prompt_ids)
        prompt_start = rows.add(group.prompt_ids, 0)
        for k, ids in enumerate(group.completion_ids):
            start = rows.add(ids[:-1], prompt_length)
            _predict(rows, 0, prompt_start + prompt_length, start, len(ids))
            if k == 0:  # the prompt and the completion right behind it are one ordinary causal sequence
                rows.segments.append(Segment(prompt_start, prompt_length + len(ids) - 1))
            elif len(ids) > 1:
                rows.segments.append(Segment(start, len(ids) - 1, prompt_start, prompt_length))
    return rows


def _packed(groups: Sequence[Group]) -> _Rows:
    rows = _Rows()
    for group in groups:
        for ids in group.completion_ids:
            start = rows.add(group.prompt_ids, 0)
            behind = rows.add(ids[:-1], len(group.prompt_ids))
            _predict(rows, 0, behind, behind, len(ids))
            rows.segments.append(Segment(start, len(group.prompt_ids) + len(ids) - 1))
    return rows


def _padded(groups: Sequence[Group]) -> _Rows:
    """One row per completion, its last token too: what a plain trainer computes, down to a router's statistics."""
    rows = _Rows()
    sequences = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
    for row, (prompt_ids, ids) in enumerate(sequences):
        rows.add(prompt_ids, 0, row)
        start = rows.add(ids, len(prompt_ids), row)
        _predict(rows, row, start, start, len(ids))
    return rows


_PLACE: dict[str, Callable[[Sequence[Group]], _Rows]] = {"tree": _tree, "packed": _packed, "padded": _padded}


def _placed(groups: Sequence[Group], layout: str, pad_token_id: int) -> dict[str, Any]:
    """The tokens of groups in rows, and what predicts which."""
    rows = _PLACE[layout](groups)
    width = max(len(ids) for ids in rows.input_ids)
    padded = layout == "padded"
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows.input_ids]
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in rows.input_ids]),
        "position_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in rows.position_ids]),
        "attention_mask": torch.tensor(mask) if padded else None,
        "segments": None if padded else rows.segments,
        "predictors": torch.tensor([row * width + position for row, position in rows.predictors]),
        "targets": torch.tensor([t for group in groups for ids in group.completion_ids for t in ids]),
        "lengths": [len(ids) for group in groups for ids in group.completion_ids],
        "num_unique_tokens": sum(len(ids) for ids in rows.input_ids),
    }


def make_batch(
    groups: Sequence[Group], layout: str, pad_token_id: int = 0, max_tokens: int | None = None
) -> dict[str, Any]:
    """Place groups in rows.

    Args:
        groups: The groups of the batch.
        layout: One of `LAYOUTS`.
        pad_token_id: Token that fills the end of `padded` rows.
        max_tokens: Most positions of one forward; a batch beyond it is placed in `parts`, cut between completions.

    Returns:
        A dict of
        `input_ids`, `position_ids` `(R, L)`; `attention_mask` `(R, L)` in `padded`, else None;
        `segments`: list of `Segment` in `tree` and `packed`, else None;
        `predictors` `(N,)`: index into the `R * L` positions of the one that predicts each scored token;
        `targets` `(N,)`: the scored tokens, completion by completion;
        `lengths`: B host integers, scored tokens of each completion;
        `group` `(B,)`: group of each completion;
        `yw_idxs`, `yl_idxs` `(T,)`: the pairs, as indices into the B completions;
        `rows`, `pair_ids`: T host integers each, data-set row and number within the row of each pair;
        `prompts`: T host strings that tell the prompt of each pair from any other;
        `weights`, `label_probs`, `offsets`: T host numbers, `ref_logps` B of them, where the groups have them;
        `keys`: B host strings that tell prompt + completion from any other;
        `num_tokens`: both sides of every pair with their prompt, a host integer, as TRL counts;
        `num_unique_tokens`: tokens placed in the rows, without padding and fillers, a host integer.
        With `parts`, a forward each: what is in rows (`input_ids` to `targets`) is in them only, each with its
        `lengths` and `num_unique_tokens`.
    """
    parts = [groups] if max_tokens is None else _cut(groups, layout, max_tokens)
    placed = [_placed(part, layout, pad_token_id) for part in parts]
    whole = (
        placed[0]
        if len(placed) == 1
        else {
            "parts": placed,
            "lengths": [length for part in placed for length in part["lengths"]],
            "num_unique_tokens": sum(part["num_unique_tokens"] for part in placed),
        }
    )
    whole["num_unique_tokens"] -= sum(positions([group], layout) for group in groups if not group.pairs)  # of fillers
    return {**whole, **_pairs(groups)}


def positions(groups: Sequence[Group], layout: str) -> int:
    """Positions of the rows that groups take in a layout, padding included."""
    prompts = [len(group.prompt_ids) for group in groups for _ in group.completion_ids]
    lengths = [len(ids) for group in groups for ids in group.completion_ids]
    if layout == "padded":
        return len(lengths) * max(p + c for p, c in zip(prompts, lengths, strict=True))
    shared = sum(prompts) if layout == "packed" else sum(len(group.prompt_ids) for group in groups)
    return shared + sum(lengths) - len(lengths)


def _fill(items: Sequence[Any], fits: Callable[[Sequence[Any]], bool]) -> list[list[Any]]:
    """Items in order, as few runs as fit; an item that does not fit by itself is a run."""
    runs: list[list[Any]] = []
    for item in items:
        if runs and fits([*runs[-1], item]):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def even_runs(groups: Sequence[Group], layout: str, max_tokens: int) -> list[list[Group]]:
    """Groups in few runs of similar size, each within `max_tokens` positions unless it is a single group.

    The longest go first, each to the run that is shortest so far; where that leaves a run too long, one more is made.
    Within a run groups keep their order.
    """
    sizes = [positions([group], layout) for group in groups]
    longest_first = sorted(range(len(groups)), key=lambda i: -sizes[i])
    for count in range(max(1, math.ceil(sum(sizes) / max_tokens)), len(groups) + 1):
        runs: list[list[int]] = [[] for _ in range(count)]
        for i in longest_first:
            min(runs, key=lambda run: sum(sizes[j] for j in run)).append(i)
        placed = [[groups[i] for i in sorted(run)] for run in runs if run]
        if all(len(run) == 1 or positions(run, layout) <= max_tokens for run in placed):
            return placed
    return [[group] for group in groups]


def _cut(groups: Sequence[Group], layout: str, max_tokens: int) -> list[list[Group]]:
    """Groups cut between completions, in runs of at most `max_tokens` positions where one completion fits."""
    single = [replace(group, completion_ids=[ids], pairs=[]) for group in groups for ids in group.completion_ids]
    runs = _fill(single, lambda run: positions(_merged(run), layout) <= max_tokens)
    for run in runs:
        taken = positions(run, layout)
        if len(run) == 1 and taken > max_tokens:
            warnings.warn(
                f"A prompt with one completion has {taken} tokens (row {run[0].row} of the data), more than "
                f"`max_tokens_per_forward` ({max_tokens}); it is computed alone. Lower `max_length` to keep within it.",
                stacklevel=2,
            )
    return [_merged(run) for run in runs]


def _merged(singles: Sequence[Group]) -> list[Group]:
    """Neighbouring completions of one row under one prompt again."""
    merged: list[Group] = []
    for single in singles:
        if merged and merged[-1].prompt_ids is single.prompt_ids:
            merged[-1] = replace(merged[-1], completion_ids=[*merged[-1].completion_ids, *single.completion_ids])
        else:
            merged.append(single)
    return merged


def _pairs(groups: Sequence[Group]) -> dict[str, Any]:
    """The pairs of the groups as indices into the completions of the batch, and the numbers given for them."""
    chosen, rejected, row_ids, pair_ids, prompts = [], [], [], [], []
    first = num_tokens = 0
    for group in groups:
        prompts += [completion_key(group.prompt_ids, ())] * len(group.pairs)
        for number, (w, l) in enumerate(group.pairs):
            num_tokens += 2 * len(group.prompt_ids) + len(group.completion_ids[w]) + len(group.completion_ids[l])
            chosen.append(first + w)
            rejected.append(first + l)
            row_ids.append(group.row)
            pair_ids.append(number)
        first += len(group.completion_ids)
    values: dict[str, Any] = {}
    for name in GROUP_VALUES:
        given = [getattr(group, name) for group in groups]
        if None not in given:
            values[name] = [number for numbers in given for number in numbers]
    return {
        **values,
        "keys": [completion_key(group.prompt_ids, ids) for group in groups for ids in group.completion_ids],
        "group": torch.tensor([g for g, group in enumerate(groups) for _ in group.completion_ids]),
        "yw_idxs": torch.tensor(chosen, dtype=torch.long),
        "yl_idxs": torch.tensor(rejected, dtype=torch.long),
        "rows": row_ids,
        "pair_ids": pair_ids,
        "prompts": prompts,
        "num_tokens": num_tokens,
    }


@dataclass
class GroupCollator:
    """Turns tokenised rows into a micro-batch; the `data_collator` of the trainer.

    Attributes:
        pad_token_id: Token that fills the end of `padded` rows.
        layout: One of `LAYOUTS`; the trainer sets it once the layout is proven.
        max_tokens: Most positions of one forward; None for no limit.
    """

    pad_token_id: int
    layout: str = "padded"
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `place` makes of some tokenised rows."""
        return self.place([group_of(row) for row in rows])

    def place(self, groups: Sequence[Group]) -> dict[str, Any]:
        """A micro-batch: `pieces`, batches within `max_tokens` where a group fits; what they were made of and by."""
        limit = self.max_tokens
        runs = [list(groups)]
        if limit is not None:
            runs = even_runs(groups, self.layout, limit)
        pieces = [make_batch(run, self.layout, self.pad_token_id, limit) for run in runs]
        return {"pieces": pieces, "groups": list(groups), "max_tokens": limit}


def group_of(row: dict[str, Any]) -> Group:
    """The group of a tokenised data-set row (columns `prompt_ids`, `completion_ids`, `pairs`, `row`, values)."""
    pairs = [(int(w), int(l)) for w, l in row["pairs"]]
    values = {name: row[name] for name in GROUP_VALUES if name in row}
    for name, value in values.items():
        if value is None:  # of a set without the column that was put together with one that has it
            if name == "ref_logps":
                raise ValueError("`ref_logps` must be given in every row or in none, got a row without. Correct it.")
            values[name] = [PAIR_VALUES[name][2]] * len(pairs)
    return Group(row["prompt_ids"], row["completion_ids"], pairs, row.get("row", 0), **values)
