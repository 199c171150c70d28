"""Rows of preference data, in every accepted form, as one form: a prompt, its completions, and pairs of indices.

No tokens here. Prompts and completions are plain text or lists of messages; a prompt may be implied by what chosen and
rejected have in common.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from itertools import product
from numbers import Real
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages

USED_COLUMNS = {
    "prompt",
    "conversations",
    "chosen",
    "rejected",
    "completions",
    "pairs",
    "scores",
    "ranks",
    "tools",
    "chat_template_kwargs",
    "weights",
    "label_probs",
    "offsets",
    "ref_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "subset",
}
"""Columns that are read."""

TEXT_COLUMNS = ("prompt", "conversations", "chosen", "rejected")
"""Columns of a text or of messages."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that a chat template is given."""

_VERDICTS = {"pairs", "scores", "ranks"}
"""Columns that say which of a row's completions are better; a row has one of them."""

PAIR_VALUES: dict[str, tuple[str, Callable[[float], bool], float]] = {
    "weights": ("be finite and 0 or more", lambda v: 0 <= v < math.inf, 1.0),
    "label_probs": ("be in [0, 1]", lambda v: 0 <= v <= 1, 1.0),
    "offsets": ("be finite", math.isfinite, 0.0),
}
"""Columns with a number for each pair: what it must be, the test of it, and what a row without one has."""

_SPOKEN = {"role", "content", "name"}
"""Keys of a message that says something and nothing else; one with others (`tool_calls`) may have no content."""

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}

FORMS = (
    "`prompt, chosen, rejected`; `chosen, rejected`; `prompt, completions, pairs`; `prompt, completions, scores`; "
    "or `prompt, completions, ranks`"
)


@dataclass(frozen=True)
class Preference:
    """One row in the common form.

    Attributes:
        prompt: Text or messages; None if it is what the completions (then whole texts) begin with.
        completions: K >= 2 texts, or lists of messages.
        pairs: `(chosen, rejected)` indices into the completions.
        pair_values: Numbers for each pair, by a name in `PAIR_VALUES`.
        ref_logps: Given reference log-probability of each completion, in nats; None without.
    """

    prompt: Text | None
    completions: list[Text]
    pairs: list[tuple[int, int]]
    pair_values: dict[str, list[float]] = field(default_factory=dict)
    ref_logps: list[float] | None = None

    @property
    def conversational(self) -> bool:
        """Whether the row holds messages rather than text."""
        return not isinstance(self.completions[0], str)


def unused_columns(columns: Iterable[str], conversational: bool) -> list[str]:
    """Columns of a data set of messages, or of text, that are not read, in alphabetical order.

    >>> unused_columns(["chosen", "rejected", "scores", "source", "tools"], conversational=False)
    ['scores', 'source', 'tools']
    """
    names = set(columns)
    unused = {"chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"} if "completions" in names else _VERDICTS
    unused = unused | ({"conversations"} if "prompt" in names else set())
    unused = unused | (set() if conversational else set(TEMPLATE_COLUMNS))
    return sorted(names - (USED_COLUMNS - unused))


def _levels(values: Sequence[float]) -> list[list[int]]:
    """Indices grouped by equal value, best (highest) first."""
    return [[i for i, v in enumerate(values) if v == level] for level in sorted(set(values), reverse=True)]


def _between(better: Sequence[Sequence[int]], worse: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Every index of one level with every index of the other, for each two levels at the same place."""
    return [pair for high, low in zip(better, worse, strict=True) for pair in product(high, low)]


PAIR_STRATEGIES: dict[str, Callable[[list[list[int]]], list[tuple[int, int]]]] = {
    "all": lambda levels: [p for i, high in enumerate(levels) for low in levels[i + 1 :] for p in product(high, low)],
    "best_vs_rest": lambda levels: _between([levels[0]] * (len(levels) - 1), levels[1:]),
    "best_vs_worst": lambda levels: _between(levels[:1], levels[-1:]) if len(levels) > 1 else [],
    "adjacent": lambda levels: _between(levels[:-1], levels[1:]),
}
"""How scores or ranks become pairs: from levels of equal value, best first, to pairs between different levels."""


def pairs_from_scores(scores: Sequence[float], strategy: str = "all") -> list[tuple[int, int]]:
    """Pairs `(chosen, rejected)` of a scored group; equal scores make no pair.

    Args:
        scores: K numbers, higher is better.
        strategy: A name in `PAIR_STRATEGIES`.

    >>> pairs_from_scores([0.1, 0.9, 0.5])
    [(1, 2), (1, 0), (2, 0)]
    >>> pairs_from_scores([0.1, 0.9, 0.5], "adjacent")
    [(1, 2), (2, 0)]
    >>> pairs_from_scores([1.0, 1.0])
    []
    """
    return PAIR_STRATEGIES[strategy](_levels(scores))


def without_nulls(value: Any) -> Any:
    """The value without None in its mappings: Arrow gives every row the keys of all others, as nulls."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def decoded(value: Any, name: str) -> Any:
    """What a file may hold as JSON text (lists in a .csv, tools), decoded; empty text is None.

    Raises:
        ValueError: If it is text that is not JSON; it names the column.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON where it is text, got {value[:40]!r}. Correct the row.") from error


def _decoded_or_text(value: Any) -> Any:
    """The value, decoded if it is JSON text."""
    try:
        return decoded(value, "")
    except ValueError:
        return value


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with `role` and `content`; ShareGPT's `from` and `value` are recognised."""
    if message.get("from") is not None:
        said = {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value")}
    else:
        said = {"content": None, **without_nulls(message)}
    if said.get("role") is None:
        raise ValueError(f"A message must have a `role` and a `content`, got {sorted(said)}. Add what is missing.")
    if said["content"] is None and said.keys() <= _SPOKEN:  # a template would write "None"
        raise ValueError(
            f"The content of a message must be text or parts where it calls no tool, got null of {said['role']!r}. "
            "Fill it in, or remove the row."
        )
    if isinstance(said["content"], (date, time)):  # a reader's guess, which a template would write in its own way
        raise ValueError(
            f"The content of a message must be text or parts, got {type(said['content']).__name__}. Make it text."
        )
    return said


def _text(value: Any, name: str) -> Text:
    """Text as it is; a message or a list of messages as a list of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return [_message(value)]
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        return [_message(message) for message in value]
    raise ValueError(f"`{name}` must be text or a list of messages, got {type(value).__name__}. Convert the column.")


def _check_pairs(pairs: Any, count: int) -> list[tuple[int, int]]:
    """`pairs` as tuples of two different indices below `count`."""
    checked = []
    for pair in pairs:
        two = isinstance(pair, Sequence) and len(pair) == 2
        if not two or not all(isinstance(i, int) and 0 <= i < count for i in pair):
            raise ValueError(
                f"`pairs` must hold [chosen, rejected] indices below {count}, the number of completions, got "
                f"{pair!r}. Correct the row."
            )
        if pair[0] == pair[1]:
            raise ValueError(f"`pairs` must name two different completions, got {list(pair)}. Remove the pair.")
        checked.append((pair[0], pair[1]))
    return checked


def _pairs_of(row: Mapping[str, Any], count: int, strategy: str) -> list[tuple[int, int]]:
    """The pairs of a row with `completions`, from its `pairs`, `scores` or `ranks`."""
    given = sorted(row.keys() & _VERDICTS)
    if len(given) > 1:
        raise ValueError(f"A row must have one of {sorted(_VERDICTS)}, got {given}. Remove the other columns.")
    name, values = given[0], row[given[0]]
    if name == "pairs":
        return _check_pairs(values, count)
    if len(values) != count:
        raise ValueError(f"`{name}` must hold one number per completion ({count}), got {len(values)}. Correct the row.")
    values = [float(value) if isinstance(value, Decimal) else value for value in values]
    if not all(isinstance(value, Real) and value == value for value in values):
        raise ValueError(f"`{name}` must be numbers, got {list(values)}. Remove the completions without one.")
    return pairs_from_scores(values if name == "scores" else [-rank for rank in values], strategy)


def _pair_values(row: Mapping[str, Any], name: str, count: int, ordered: bool) -> list[float]:
    """A number for each pair: one for the row, or a list in the order of its pairs."""
    rule, holds, _ = PAIR_VALUES[name]
    value = _decoded_or_text(row[name])
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value] * count
    if several and (not ordered or len(values) != count):
        each = f", or one for each of the {count} pairs" if ordered else " where pairs are derived"
        raise ValueError(f"`{name}` must be one number{each}, got {len(values)} numbers. Correct the row.")
    for number in values:
        if not isinstance(number, (int, float)) or not holds(number):
            raise ValueError(f"`{name}` must {rule}, got {number!r}. Correct the row.")
    return [float(number) for number in values]


def _given_ref_logps(row: Mapping[str, Any], count: int) -> list[float] | None:
    """Given reference log-probabilities: `ref_logps`, or TRL's `ref_chosen_logps` and `ref_rejected_logps`."""
    sides = [row.get(name) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    given = _decoded_or_text(row.get("ref_logps"))
    if given is None and sides != [None, None] and "completions" not in row:
        given = sides
    if given is None:
        return None
    numbers = isinstance(given, Sequence) and len(given) == count
    if not numbers or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in given):
        raise ValueError(
            f"`ref_logps` must be one finite number per completion ({count}), got {given}. Correct the row."
        )
    return [float(value) for value in given]


def _split_messages(chosen: Messages, rejected: Messages) -> tuple[Messages, list[Text]]:
    """The common prefix in whole messages, and what follows it on each side."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _words(content: Any) -> str:
    """The text of a message's content, also if it is in parts, whatever its white space."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(" ".join(str(text or "") for text in texts).split())


def _two_sides(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text | None, list[Text]]:
    """The prompt of a row with two sides (None if texts imply it), and the sides behind it.

    Some sets give the prompt as text or messages beside sides that are conversations and begin with it, or with its
    last turns (a system message is then in the prompt alone).

    Raises:
        ValueError: If a prompt of text is in none of the messages that the sides begin with, nor any of them in it.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        return prompt, [chosen, rejected]
    shared, ends = _split_messages(chosen, rejected)
    if isinstance(prompt, str) and not shared:
        return prompt, [chosen, rejected]
    if isinstance(prompt, str):
        said = [text for message in shared if (text := _words(message.get("content")))]
        if said and not any(_words(prompt) in text or text in _words(prompt) for text in said):
            raise ValueError(
                f"`prompt` must be in the messages that both sides begin with, got {prompt[:40]!r} and "
                f"{said[0][:40]!r}. Make it a message, or remove the column."
            )
    given = prompt if prompt and not isinstance(prompt, str) else shared
    repeated = max(n for n in range(len(given) + 1) if given[len(given) - n :] == shared[:n])
    return ([*given, *shared[repeated:]], ends) if repeated else (given, [chosen, rejected])


def _list(value: Any, name: str) -> list[Any]:
    """A column that holds a list, perhaps as JSON text."""
    found = _decoded_or_text(value)
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"`{name}` must be a list, got {type(found).__name__}. Convert the column.")
    return list(found)


def _require(condition: bool, row: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse a row without what it needs, and say which of that is there and null."""
    if not condition:
        for name in needed:
            if name in row and row[name] is None:
                raise ValueError(f"`{name}` must be text or a list, got null. Fill it in, or remove the row.")
        raise ValueError(f"A data set must have the columns {FORMS}, got {sorted(row)}. Rename or add columns.")


def _kinds(prompt: Text | None, completions: Sequence[Text]) -> None:
    """Refuse rows that mix text and messages."""
    kinds = {isinstance(text, str) for text in completions} | (
        {isinstance(prompt, str)} if prompt is not None else set()
    )
    if len(kinds) > 1:
        raise ValueError("Prompt and completions must all be text or all be messages, got both. Convert one of them.")


def parse_row(row: Mapping[str, Any], pair_strategy: str = "all") -> Preference:
    """One row of any accepted form in the common form.

    Args:
        row: The row's columns; a column that is None counts as absent.
        pair_strategy: How `scores` or `ranks` become pairs; a name in `PAIR_STRATEGIES`.

    Returns:
        The prompt (None if it is implied by two texts), the completions and the pairs.

    Raises:
        ValueError: For missing or contradicting columns, indices out of range or equal, mixed text and messages.

    >>> parse_row({"prompt": "2 + 2 =", "completions": [" 4", " 5"], "ranks": [1, 2]}).pairs
    [(0, 1)]
    """
    given, row = row, {key: value for key, value in row.items() if value is not None}
    if "completions" in row:
        for name in row.keys() & {"completions", *_VERDICTS}:
            row[name] = _list(row[name], name)
    if "prompt" not in row and "conversations" in row:
        row["prompt"] = row["conversations"]
    if "completions" in row:
        _require("prompt" in row and bool(row.keys() & _VERDICTS), given, ("prompt", *sorted(_VERDICTS)))
        prompt: Text | None = _text(row["prompt"], "prompt")
        completions = [_text(completion, "completions") for completion in row["completions"]]
        if len(completions) < 2:
            raise ValueError(f"`completions` must hold two or more, got {len(completions)}. Remove the row.")
        pairs = _pairs_of(row, len(completions), pair_strategy)
    else:
        _require("chosen" in row and "rejected" in row, given, ("chosen", "rejected", "completions"))
        chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
        prompt = _text(row["prompt"], "prompt") if "prompt" in row else None
        prompt, completions = _two_sides(prompt, chosen, rejected)
        pairs = [(0, 1)]
    _kinds(prompt, completions)
    ordered = "pairs" in row or "completions" not in row
    values = {name: _pair_values(row, name, len(pairs), ordered) for name in PAIR_VALUES if name in row}
    return Preference(prompt, completions, pairs, values, _given_ref_logps(row, len(completions)))
