"""From rows of preference data to tokenised groups.

Nothing downstream knows of chat templates, special tokens or truncation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data_report import DataReport, data_report
from qlora_dpo.preferences import (
    FORMS,
    PAIR_VALUES,
    TEMPLATE_COLUMNS,
    Preference,
    decoded,
    parse_row,
    unused_columns,
    without_nulls,
)
from qlora_dpo.prompts import merge_prompts

DATA_VERSION = 6
"""Part of the cache key of tokenised data: raise it when the same row gives other tokens or columns."""

GROUP_COLUMNS = ["prompt_ids", "completion_ids", "pairs", "row"]
_FEATURES = Features(
    {
        "prompt_ids": List(Value("int64")),
        "completion_ids": List(List(Value("int64"))),
        "pairs": List(List(Value("int64"))),
        "row": Value("int64"),
        "truncated": Value("bool"),
        "boundary_moved": Value("bool"),
        "lost_pairs": Value("int32"),
        "whole_length": Value("int64"),
        "dropped": Value("string"),
    }
)
_VALUES = {name: List(Value("float64")) for name in (*PAIR_VALUES, "ref_logps")}
_ABOUT = {"subset": Value("string"), "turns": Value("int64")}
ABOUT_COLUMNS = list(_ABOUT)
"""What is said of a group in reports: the row's `subset`, and the turns of a conversation."""
VALUE_COLUMNS = list(_VALUES)
"""Columns of a tokenised data set that are there if its rows have them."""

KEPT = ""
EMPTY_PROMPT = "no token is left of the prompt, so nothing predicts the first token of a completion"
LONG_PROMPT = "the prompt alone has max_length tokens or more"
NO_COMMON_START = "no prompt is given, and chosen and rejected do not begin with the same message or token"
CUT_REFERENCE = "its reference log-probabilities are given for whole completions, and it was cut to the token limits"
NO_PAIRS = "no pair of different completions is left (equal texts, scores or truncated tokens)"


@dataclass(frozen=True)
class TokenLimits:
    """How long things may be, in tokens; None for no limit.

    Attributes:
        max_length: Prompt + completion. A prompt this long drops its group; completions are cut at their end.
        max_prompt_length: The prompt; its last tokens are kept.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None


def _common_prefix(ids: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Leading tokens that `ids` shares with every one of the others."""
    length = min(len(ids), *(len(other) for other in others))
    for other in others:
        length = next((i for i in range(length) if ids[i] != other[i]), length)
    return length


def _render(tokenizer: PreTrainedTokenizerBase, preference: Preference, row: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of the prompt with the generation prompt, and of prompt + each completion, as the template has them."""
    tools, named = (without_nulls(decoded(row.get(name), name)) for name in TEMPLATE_COLUMNS)
    if not isinstance(named or {}, Mapping):
        raise ValueError(f"`chat_template_kwargs` must be a dict, got {named!r}. Correct the row.")
    options = {"tools": tools, **(named or {})}
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise ValueError(
            "The tokenizer must have a chat template to render messages, got none. Set `tokenizer.chat_template`, use "
            "an instruct model, or give plain text."
        )
    prompt = list(preference.prompt or [])
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options)]
    for completion in preference.completions:
        texts.append(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **options))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _encode(tokenizer: PreTrainedTokenizerBase, preference: Preference, row: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of the prompt and of prompt + each completion: one BOS if the tokenizer adds one, one EOS last."""
    eos = tokenizer.eos_token or ""
    prompt = preference.prompt or ""
    wholes = [
        f"{prompt}{text}" if str(text).endswith(eos) else f"{prompt}{text}{eos}" for text in preference.completions
    ]
    found = tokenizer([str(prompt), *wholes])["input_ids"]
    front, back = _added(found[1], tokenizer(wholes[0], add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id in back:  # the texts hold the EOS they need, and a prompt goes on
        found = [ids[: len(ids) - len(back)] for ids in found]
    bos = tokenizer.bos_token_id
    if bos is not None and bos in front:
        found = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in found]
    return found


def _added(ids: Sequence[int], plain: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """What a tokenizer adds before and behind a text's own tokens, told by place: BOS and EOS may be one token.

    >>> _added([2, 7, 8, 2], [7, 8, 2]), _added([7, 2, 2], [7, 2])
    (([2], []), ([], [2]))
    """
    for first in range(len(ids) - len(plain) + 1):
        if list(ids[first : first + len(plain)]) == list(plain):
            return ids[:first], ids[first + len(plain) :]
    return [], []


def _distinct(
    completion_ids: Sequence[list[int]], pairs: Sequence[tuple[int, int]]
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Which completions take part in a pair, equal ones once, and by number the pairs between different ones."""
    place: dict[tuple[int, ...], int] = {}
    kept: list[int] = []
    distinct_pairs = {}
    for number, pair in enumerate(pairs):
        sides = [tuple(completion_ids[i]) for i in pair]
        if all(sides) and sides[0] != sides[1]:
            for i, ids in zip(pair, sides, strict=True):
                if place.setdefault(ids, len(kept)) == len(kept):
                    kept.append(i)
            distinct_pairs[number] = (place[sides[0]], place[sides[1]])
    return kept, distinct_pairs


def tokenize_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    pair_strategy: str = "all",
    data_version: int = DATA_VERSION,
    values: Sequence[str] = (),
) -> dict[str, Any]:
    """One row as a tokenised group.

    The prompt ends where its tokens alone and its tokens before each completion part, which is not always after its
    last character: tokens may merge across the boundary, and a template may render a lone prompt differently.

    Args:
        row: Columns in a form `preferences.parse_row` accepts.
        index: Number of the row, for messages and to know the pairs again.
        tokenizer: Its chat template renders messages.
        limits: Token limits.
        pair_strategy: How scores or ranks become pairs.
        data_version: `DATA_VERSION`, so that it takes part in the cache key.
        values: Names in `VALUE_COLUMNS` to return too.

    Returns:
        `prompt_ids`, `completion_ids`, `pairs`, `row`; `dropped`: the reason, or "" if the group is kept; for the
        report `truncated`, `boundary_moved`, `lost_pairs` (of a kept group), `whole_length` (tokens of prompt + longest
        completion before they are cut); and `values`: a number for each pair, `ref_logps` for each completion.
    """
    about = {"subset": None if row["subset"] is None else str(row["subset"])} if "subset" in row else {}
    try:
        return {"row": index, **about} | _tokenized(row, tokenizer, limits, pair_strategy, values)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(f"Row {index} of the data set: {error}") from error


def _tokenize_streamed_row(row: Mapping[str, Any], index: int, **options: Any) -> dict[str, Any]:
    """`tokenize_row`, with a number that no other worker of the loader gives, as each counts its own rows."""
    worker = get_worker_info()
    return tokenize_row(row, index if worker is None else index * worker.num_workers + worker.id, **options)


def sequences(
    row: Mapping[str, Any], preference: Preference, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], int, bool] | None:
    """Token ids of prompt + each completion, and where the prompt ends in them.

    Args:
        row: The row, for `tools` and `chat_template_kwargs`.
        preference: The row in the common form.
        tokenizer: Its chat template renders messages.

    Returns:
        The sequences, the length of the prompt, and whether that is less than the prompt alone has; None if the prompt
        is implied and the sides have no common start.
    """
    if preference.prompt == []:
        return None
    prompt_ids, *wholes = (_render if preference.conversational else _encode)(tokenizer, preference, row)
    implied = preference.prompt is None
    boundary = _common_prefix(wholes[0] if implied else prompt_ids, wholes)
    if implied and set(wholes[0][:boundary]) <= {tokenizer.bos_token_id}:
        return None
    return wholes, boundary, not implied and boundary < len(prompt_ids)


def _tokenized(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    pair_strategy: str,
    values: Sequence[str],
) -> dict[str, Any]:
    """What `tokenize_row` returns, but for the row's number."""
    later = [name for name in value_columns([n for n in row if row[n] is not None]) if name not in values]
    if later:
        raise ValueError(
            f"`{later[0]}` must be in the first row of a stream, from which its columns are known, got it here only. "
            "Give it there too, or name the stream's features."
        )
    preference = parse_row(row, pair_strategy)
    group: dict[str, Any] = {"boundary_moved": False, "lost_pairs": 0, "whole_length": 0, "turns": _turns(preference)}
    found = sequences(row, preference, tokenizer)
    if found is None:
        return group | _dropped(NO_COMMON_START, values)
    wholes, boundary, group["boundary_moved"] = found
    group["whole_length"] = max(map(len, wholes))
    return group | _cut(wholes, boundary, preference, limits, values)


def _turns(preference: Preference) -> int:
    """Messages of the user in a conversation; 1 for text."""
    if not isinstance(preference.prompt, list):
        return 1
    return max(1, sum(message.get("role") == "user" for message in preference.prompt))


def _dropped(reason: str, values: Sequence[str] = ()) -> dict[str, Any]:
    """A group of which nothing is left."""
    empty: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "pairs": [], "truncated": False}
    return empty | {name: [] for name in values} | {"dropped": reason}


def _cut(
    wholes: Sequence[list[int]], boundary: int, preference: Preference, limits: TokenLimits, values: Sequence[str]
) -> dict[str, Any]:
    """Cut whole sequences at the boundary and to the limits, and say what is left."""
    prompt_ids = wholes[0][:boundary]
    truncated = False
    if limits.max_prompt_length is not None and len(prompt_ids) > limits.max_prompt_length:
        prompt_ids, truncated = prompt_ids[-limits.max_prompt_length :], True
    completion_ids = [whole[boundary:] for whole in wholes]
    dropped = EMPTY_PROMPT if not prompt_ids else KEPT
    if limits.max_length is not None:
        room = limits.max_length - len(prompt_ids)
        if room <= 0:
            dropped = LONG_PROMPT
        paired = {i for pair in preference.pairs for i in pair}
        truncated |= any(len(completion_ids[i]) > room for i in paired)
        completion_ids = [ids[: max(room, 0)] for ids in completion_ids]
    kept, kept_pairs = _distinct(completion_ids, preference.pairs)
    if not dropped and not kept_pairs:
        dropped = NO_PAIRS
    if not dropped and truncated and "ref_logps" in values:
        dropped = CUT_REFERENCE
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [completion_ids[i] for i in kept],
        "pairs": [list(pair) for pair in kept_pairs.values()],
        "truncated": truncated,
        "dropped": dropped,
        "lost_pairs": 0 if dropped else len(preference.pairs) - len(kept_pairs),
        **_values(preference, kept, list(kept_pairs), values),
    }


def _values(
    preference: Preference, kept: Sequence[int], kept_pairs: Sequence[int], values: Sequence[str]
) -> dict[str, list[float]]:
    """The numbers of the completions and pairs that are kept."""
    found = {}
    for name in values:
        if name == "ref_logps":
            if preference.ref_logps is None:
                raise ValueError("`ref_logps` must be given in every row or in none, got a row without. Correct it.")
            found[name] = [preference.ref_logps[i] for i in kept]
        else:
            given = preference.pair_values.get(name)
            found[name] = [PAIR_VALUES[name][2] if given is None else given[number] for number in kept_pairs]
    return found


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    *,
    name: str = "train",
    pair_strategy: str = "all",
    merge: bool = False,
    num_proc: int | None = None,
    batch_size: int = 1,
) -> tuple[Dataset | IterableDataset, DataReport | None]:
    """Tokenise a preference data set.

    Args:
        dataset: Rows in any accepted form; one that is already tokenised is returned as it is.
        tokenizer: Tokenizer of the model.
        limits: Token limits.
        name: What to call the set in progress bars, the report and errors.
        pair_strategy: How scores or ranks become pairs.
        merge: Whether rows with one prompt become one group.
        num_proc: Processes to tokenise with.
        batch_size: Groups in a batch, for the report's padded count.

    Returns:
        The groups (columns `GROUP_COLUMNS`) and the report; no report for a stream or for tokenised rows.

    Raises:
        ValueError: If the set is empty, its columns are not understood, every row is dropped, or a stream is to merge.
    """
    columns = columns_of(dataset)
    _require_whole(dataset, columns, name, merge)
    if set(GROUP_COLUMNS) <= set(columns):
        return merge_prompts(_numbered(dataset)) if merge else _numbered(dataset), None
    dataset = dataset.with_format(None)
    values = value_columns(columns)
    options = {
        "tokenizer": tokenizer,
        "limits": limits,
        "pair_strategy": pair_strategy,
        "data_version": DATA_VERSION,
        "values": values,
    }
    about = [name for name in ABOUT_COLUMNS if name != "subset" or name in columns]
    features = Features({**_FEATURES, **{name: (_VALUES | _ABOUT)[name] for name in (*values, *about)}})
    if isinstance(dataset, IterableDataset):
        stream = dataset.map(
            _tokenize_streamed_row, with_indices=True, fn_kwargs=options, remove_columns=columns, features=features
        )
        return stream.filter(lambda row: not row["dropped"]), None
    mapped = dataset.map(
        tokenize_row,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=columns,
        features=features,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    keep = [i for i, reason in enumerate(mapped["dropped"]) if not reason]
    if not keep:
        raise _all_dropped(name, mapped, limits)
    kept = mapped.select(keep).select_columns([*GROUP_COLUMNS, *values, *about])
    if merge:
        kept = merge_prompts(kept)
    conversational = parse_row(dataset[keep[0]], pair_strategy).conversational
    return kept, data_report(name, mapped, kept, unused_columns(columns, conversational), tokenizer, batch_size)


def _require_whole(dataset: Dataset | IterableDataset, columns: Sequence[str], name: str, merge: bool) -> None:
    """Refuse a set that cannot be what it is to become.

    Raises:
        ValueError: If it has no rows, no columns that are understood or a transform, or is a stream that is to merge.
    """
    stream, tokenised = isinstance(dataset, IterableDataset), set(GROUP_COLUMNS) <= set(columns)
    if stream and merge:
        raise ValueError(
            f"`merge_prompts` must be False for a stream, whose rows are not known beforehand, got a {name} data set "
            "that is one. Load it whole, or leave the option out."
        )
    if not tokenised and getattr(dataset, "format", {}).get("type") == "custom":
        raise ValueError(
            f"The {name} data set must have no transform, got one, which makes rows as they are read. Use `map`."
        )
    if stream or tokenised:
        return
    if len(dataset) == 0:
        raise ValueError(f"The {name} data set must have rows, got none. Check its path and split.")
    if not _recognised(columns):
        raise ValueError(f"The {name} data set must have the columns {FORMS}, got {columns}. Rename or add columns.")


def _all_dropped(name: str, mapped: Dataset, limits: TokenLimits) -> ValueError:
    """What to say where nothing is left of a data set."""
    reasons = "; ".join(f"{count}: {reason}" for reason, count in Counter(mapped["dropped"]).items())
    lengths = sorted(mapped["whole_length"])
    way_out = "Correct the rows."
    if limits.max_length is not None and any(mapped["truncated"]):
        way_out = (
            f"Raise `max_length`, now {limits.max_length:,}: whole, half of the rows have at most "
            f"{lengths[len(lengths) // 2]:,} tokens, and the longest {lengths[-1]:,}."
        )
    return ValueError(
        f"The {name} data set must keep at least one row, all {len(mapped)} were dropped ({reasons}). {way_out}"
    )


def _numbered(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Tokenised rows with a number each of their own, which sets that were put together may lack."""
    if isinstance(dataset, IterableDataset) or len(set(dataset["row"])) == len(dataset):
        return dataset
    return dataset.remove_columns("row").add_column("row", list(range(len(dataset))))


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set; a stream of a generator only shows them in its first row."""
    if dataset.column_names is None:
        return list(next(iter(dataset), {}))
    return list(dataset.column_names)


def value_columns(columns: Sequence[str]) -> list[str]:
    """The columns with numbers for pairs and completions among those of a data set, as `VALUE_COLUMNS` names them."""
    halves = {"ref_chosen_logps", "ref_rejected_logps"} & set(columns)
    if len(halves) == 1:
        raise ValueError(
            f"`ref_chosen_logps` and `ref_rejected_logps` must be given both or neither, got {halves.pop()} alone. Add "
            "the other, or remove it."
        )
    given = {"ref_logps"} if halves else set()
    return [name for name in VALUE_COLUMNS if name in {*columns, *given}]


def _recognised(columns: Sequence[str]) -> bool:
    """Whether the columns are one of the accepted forms."""
    names = set(columns)
    ranked = "completions" in names and bool(names & {"prompt", "conversations"})
    return {"chosen", "rejected"} <= names or (ranked and bool(names & {"pairs", "scores", "ranks"}))


def as_named(dataset: Any) -> dict[str, Any]:
    """One data set, or several by name, as several by name; the name of a single one is empty."""
    return dict(dataset) if isinstance(dataset, (dict, DatasetDict)) else {"": dataset}
