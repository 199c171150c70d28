"""Implicit rewards of completions, beta (log pi - log ref), from base and adapter folder, one 4-bit model in memory.

For picking the best of many completions, and for filtering preference data. Completions are scored whole, never cut.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from jinja2 import TemplateError
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data import EMPTY_PROMPT, NO_COMMON_START, sequences
from qlora_dpo.errors import memory_said
from qlora_dpo.files import json_row
from qlora_dpo.forward import prepare_policy, score_batch
from qlora_dpo.layouts import Group, make_batch
from qlora_dpo.model import load_tokenizer
from qlora_dpo.preferences import PAIR_VALUES, Preference, parse_row
from qlora_dpo.proof import extreme_groups, prove_models
from qlora_dpo.record import (
    policy_of,
    read_record,
    recorded_reference,
    require_base,
    require_known,
    warn_of_reference,
    weights_hash,
)
from qlora_dpo.reference import ModelReference, Reference, make_reference
from qlora_dpo.resuming import warn_of_base

OUTPUTS = ("row", "rewards", "logps", "reference_logps", "tokens", "ranking", "margin", "error")
"""Keys that are written here; those that a row brings from an earlier scoring are not kept."""
# Not `ref_logps`: a data set with that column is trained on with its numbers as the reference.
_UNREAD = {"pairs", "scores", "ranks", *PAIR_VALUES, "ref_logps", "ref_chosen_logps", "ref_rejected_logps"}
_HUB = ("token", "cache_dir", "local_files_only")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Scorer:
    """A policy and what it is compared with.

    Attributes:
        policy: Base with the adapter, prepared by `prepare_policy`.
        tokenizer: The tokenizer of the model.
        reference: What rewards are relative to.
        beta: Factor of the rewards.
        mixed_precision: `bf16`, `fp16` or `no`, as in training.
        layout: The layout that was proven; None before the first batch.
    """

    policy: PeftModel
    tokenizer: PreTrainedTokenizerBase
    reference: Reference
    beta: float
    mixed_precision: str = "no"
    layout: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.policy.get_base_model().device

    @property
    def context(self) -> int | None:
        """Most tokens that the model is made for; None if its config does not say."""
        return getattr(self.policy.config.get_text_config(), "max_position_embeddings", None)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The mixed precision of the training."""
        dtype = _DTYPES.get(self.mixed_precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def load_scorer(adapter: str, reference: str | None = None, base: str | None = None, **model_kwargs: Any) -> Scorer:
    """Base, adapter and reference, quantised and computed as in the training that `qlora_dpo.json` records.

    Args:
        adapter: Folder of a saved adapter with its `qlora_dpo.json`.
        reference: `base`, `none`, or the path or id of an adapter or a model; None for the recorded one.
        base: Hub id or folder to take in place of the recorded base, for one that has moved.
        **model_kwargs: Passed to `from_pretrained` (`device_map`, `trust_remote_code`, ...).

    Raises:
        FileNotFoundError: If there is no record, or its base is not there.
        ValueError: If the recorded reference cannot be had again, or the one named is the trained policy itself.
    """
    record = read_record(adapter)
    asked = recorded_reference(record, given=False) if reference is None else reference
    if asked in ("auto", "initial", "adapter"):
        raise ValueError(
            f"`reference` must be 'base', 'none' or a path or id, got '{asked}'. Leave it out or name one."
        )
    require_known(record, asked)
    if base is None:
        require_base(record, adapter, **{name: model_kwargs[name] for name in _HUB if name in model_kwargs})
    policy = policy_of(record, adapter, base, **model_kwargs)
    policy.eval()
    prepare_policy(policy)
    others = {name: value for name, value in model_kwargs.items() if name != "revision"}  # which is the base's
    in_4bit = record.reference_in_4bit if reference is None else record.quantization is not None
    made = make_reference(asked, policy, in_4bit=in_4bit, model_kwargs=others)
    warn_of_reference(record, made)
    warn_of_base(record, policy)
    trusted = {name: model_kwargs[name] for name in ("trust_remote_code",) if name in model_kwargs}
    return Scorer(policy, load_tokenizer(adapter, **trusted), made, record.beta, record.mixed_precision)


def score_completions(
    scorer: Scorer, rows: Iterable[Mapping[str, Any]], batch_size: int = 8, max_length: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rewards of the completions of each row, in the order of the rows.

    Args:
        scorer: What `load_scorer` returns.
        rows: Rows with `prompt` and one or more `completions`, or with `chosen` and `rejected` as in training; text or
            messages.
        batch_size: Rows in a forward; rewards depend on it by rounding only.
        max_length: Most tokens of prompt + completion; None for what the model is made for.

    Returns:
        Each row with, per completion, `rewards`, `logps` and `reference_logps` in nats, `tokens`; `ranking`: indices,
        best first, ties in input order; and for chosen and rejected `margin`. A row that cannot be scored has `error`,
        the reason, instead.

    Raises:
        ValueError: If `batch_size` is below 1.

    Source: Rafailov et al. 2023, arXiv:2305.18290, section 5.1 (the implicit reward).
    """
    return itertools.chain.from_iterable(_batches(scorer, rows, batch_size, max_length))


def _batches(
    scorer: Scorer, rows: Iterable[Mapping[str, Any]], batch_size: int, max_length: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Scored rows, batch by batch."""
    _require_positive(batch_size)
    source = iter(rows)
    taken = iter(lambda: list(itertools.islice(source, batch_size)), [])
    return (_scored(scorer, batch, max_length) for batch in taken)


def _require_positive(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}. Use 1 for the least memory.")


def _scored(scorer: Scorer, rows: list[Mapping[str, Any]], max_length: int | None) -> list[dict[str, Any]]:
    """The rows of a batch with their numbers, or with the reason why they have none."""
    found = [_group(scorer, row, max_length) for row in rows]
    groups = [one[0] for one in found if not isinstance(one, str)]
    numbers = iter(_logps(scorer, groups) if groups else [])
    lines = []
    for row, one in zip(rows, found, strict=True):
        kept = {name: value for name, value in row.items() if name not in OUTPUTS}
        lines.append(kept | ({"error": one} if isinstance(one, str) else _numbers(scorer, kept, one, next(numbers))))
    return lines


def _group(scorer: Scorer, row: Mapping[str, Any], max_length: int | None) -> tuple[Group, list[int]] | str:
    """A row's prompt with its different completions, and which of those each completion is; or why there is none."""
    try:
        preference, count = _parsed(row)
        found = sequences(row, preference, scorer.tokenizer)
    except (ValueError, TypeError, TemplateError) as error:
        return str(error)
    if found is None:
        return NO_COMMON_START
    wholes, boundary, _ = found
    reason = _unfit(wholes[:count], boundary, scorer.context if max_length is None else max_length)
    if reason is not None:
        return reason
    place: dict[tuple[int, ...], int] = {}
    places = [place.setdefault(tuple(whole[boundary:]), len(place)) for whole in wholes[:count]]
    return Group(wholes[0][:boundary], [list(ids) for ids in place], []), places


def _parsed(row: Mapping[str, Any]) -> tuple[Preference, int]:
    """The row in the common form, and how many completions it has: that form has two or more."""
    read = {name: value for name, value in row.items() if name not in _UNREAD}
    completions = read.get("completions")
    if completions is None:
        return parse_row(read), 2
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"`completions` must be a list of one or more, got {completions!r}. Correct the row.")
    doubled = completions * 2 if len(completions) == 1 else completions
    return parse_row(read | {"completions": doubled, "pairs": []}), len(completions)


def _unfit(wholes: list[list[int]], boundary: int, limit: int | None) -> str | None:
    """Why sequences cannot be scored, if they cannot."""
    if boundary == 0:
        return EMPTY_PROMPT
    longest = max(len(whole) for whole in wholes)
    if limit is not None and longest > limit:
        return f"prompt and completion must have at most {limit} tokens together, got {longest}"
    empty = [i for i, whole in enumerate(wholes) if len(whole) == boundary]
    return f"every completion must have a token, got none in completion {empty[0]}" if empty else None


def _logps(scorer: Scorer, groups: list[Group]) -> list[list[tuple[float, float]]]:
    """Log-probabilities under policy and reference, in nats, of the completions of each group."""
    smaller = memory_said("while rows were scored", "Use a smaller `batch_size`, or leave out the longest rows.")
    with torch.no_grad(), scorer.autocast(), smaller:
        if scorer.layout is None:
            scorer.layout = _proven_layout(scorer, groups)
        batch = send_to_device(make_batch(groups, scorer.layout, scorer.tokenizer.pad_token_id), scorer.device)
        ref_logps = scorer.reference(scorer.policy, batch)["logps"].tolist()
        logps = score_batch(scorer.policy, batch)["logps"].tolist()
    both = zip(logps, ref_logps, strict=True)
    return [list(itertools.islice(both, len(group.completion_ids))) for group in groups]


def _proven_layout(scorer: Scorer, groups: list[Group]) -> str:
    """The tree if it proves equal to one row at a time on these groups, under the policy and a reference model."""
    sample = extreme_groups(  # the proof compares two rows of a group with each other
        replace(group, completion_ids=[*group.completion_ids, group.completion_ids[0]]) for group in groups
    )
    other = scorer.reference.placed_on(scorer.device) if isinstance(scorer.reference, ModelReference) else None
    layout, _ = prove_models(scorer.policy, other, sample, "auto", scorer.context, scorer.device)
    return layout


def _numbers(
    scorer: Scorer, row: Mapping[str, Any], found: tuple[Group, list[int]], logps: list[tuple[float, float]]
) -> dict[str, Any]:
    """What is said of a row: per completion, nats and tokens; the ranking, and the margin of chosen and rejected."""
    group, places = found
    pi, ref = [logps[i][0] for i in places], [logps[i][1] for i in places]
    rewards = [scorer.beta * (p - r) for p, r in zip(pi, ref, strict=True)]
    if not all(math.isfinite(reward) for reward in rewards):
        return {"error": f"every reward must be finite, got {rewards}"}
    tokens = [len(group.completion_ids[i]) for i in places]
    ranking = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    margin = {"margin": rewards[0] - rewards[1]} if row.get("completions") is None else {}
    return {"rewards": rewards, "logps": pi, "reference_logps": ref, "tokens": tokens, "ranking": ranking, **margin}


# ---- files -----------------------------------------------------------------------------------------------------------


def score_file(
    adapter: str,
    source: str,
    target: str,
    batch_size: int = 8,
    reference: str | None = None,
    min_margin: float | None = None,
    **model_kwargs: Any,
) -> int:
    """Score a .jsonl file into another; started again after a kill, it goes on behind the rows that are done.

    Each line of `target` is a row of `source` with its numbers and `row`, the number of its line from 0. Beside it,
    `target.progress` keeps how far the work is and what it was asked for.

    Args:
        adapter: Folder of a saved adapter with its `qlora_dpo.json`.
        source: The rows, as `score_completions` takes them.
        target: Where the lines go.
        batch_size: Rows in a forward.
        reference: As in `load_scorer`.
        min_margin: Leave out rows whose margin is below; those that have none (completions, errors) stay.
        **model_kwargs: As in `load_scorer`.

    Returns:
        Rows that were scored now; those with an `error` do not count.

    Raises:
        FileNotFoundError: If there is no source.
        ValueError: If a line is not JSON, or `target` is of other work.
    """
    _require_positive(batch_size)
    if not Path(source).is_file():
        raise FileNotFoundError(f"`source` must be a .jsonl file, got {source}. Check the path.")
    if Path(target).exists() and Path(target).samefile(source):
        raise ValueError(f"`target` must be another file than `source`, got {target} for both. Name a new one.")
    weights = weights_hash(adapter) if Path(adapter).is_dir() else None  # trained anew, it is another adapter
    asked = {"adapter": adapter, "weights": weights, "source": source, "reference": reference, "min_margin": min_margin}
    done = _resumed(target, asked)
    with Path(source).open("rb") as file:
        total = max((number for number, line in enumerate(file, 1) if line.strip()), default=0)
    if done >= total:
        return 0
    scorer, scored = load_scorer(adapter, reference, **model_kwargs), 0
    numbers: list[int] = []
    lines = hashlib.sha256()
    rows = _rows_behind(source, done, numbers, lines)
    with Path(target).open("ab") as out, tqdm(total=total, initial=done, desc="Scoring", unit="row") as bar:
        for batch in _batches(scorer, rows, batch_size):
            for number, row in zip(numbers, batch, strict=True):
                if min_margin is None or row.get("margin", math.inf) >= min_margin:
                    line = json.dumps({"row": number} | row, ensure_ascii=False) + "\n"
                    out.write(line.encode(errors="backslashreplace"))  # half an emoji, as JSON writes it
            out.flush()
            bar.update(numbers[-1] + 1 - done)
            scored, done = scored + sum("error" not in row for row in batch), numbers[-1] + 1
            _write_progress(target, asked | {"rows": done, "bytes": out.tell(), "lines": lines.hexdigest()})
            numbers.clear()
    return scored


def row_errors(target: str) -> list[str]:
    """What the lines of a scored file say of rows that could not be scored, whenever that was."""
    with Path(target).open("rb") as file:
        lines = map(json.loads, file)
        return [f"row {line['row']}: {line['error']}" for line in lines if "error" in line]


def _rows_behind(source: str, done: int, numbers: list[int], lines: Any) -> Iterator[dict[str, Any]]:
    """Rows of a file behind its first lines, blank ones passed over.

    The number of each is added to `numbers`, and every line that is read, also before them, to the hash `lines`.
    """
    with Path(source).open("rb") as file:
        for number, line in enumerate(file):
            lines.update(line.strip())
            if number < done or not line.strip():
                continue
            row = json_row(line, number + 1, source)
            numbers.append(number)
            yield row


def _resumed(target: str, asked: dict[str, Any]) -> int:
    """How many lines of the source are done; a last line of the target that was half written is cut off.

    Raises:
        ValueError: If the target was not written here, or for other work.
    """
    path = Path(f"{target}.progress")
    progress = json.loads(path.read_text()) if path.is_file() else {**asked, "rows": 0, "bytes": None}
    begun = progress["rows"] > 0 or (Path(target).is_file() and Path(target).stat().st_size > 0)
    for name, value in asked.items():
        if begun and progress.get(name) != value:
            raise ValueError(
                f"`{name}` must be that of the first time to go on with {target} ({progress.get(name)!r}), got "
                f"{value!r}. Name another `target`."
            )
    lines = _lines_hash(asked["source"], progress["rows"])
    if progress.get("lines", lines) != lines:
        raise ValueError(
            f"`source` must begin with the {progress['rows']} lines that {target} is of, got other ones in "
            f"{asked['source']}. Name another `target`."
        )
    Path(target).touch()
    whole, last = 0, b""
    with Path(target).open("r+b") as file:
        for line in file:
            whole, last = (whole + len(line), line) if line.endswith(b"\n") else (whole, last)
        try:
            written = int(json.loads(last)["row"]) + 1 if last else 0
        except (ValueError, TypeError, KeyError):
            written = None
        if written is None or (progress["bytes"] is None and file.tell() > 0 == whole):
            raise ValueError(f"`target` must be new or written by `score_file`, got {target}. Name another.")
        file.truncate(whole)
    done = max(written, progress["rows"]) if whole >= (progress["bytes"] or 0) else written
    _write_progress(target, asked | {"rows": done, "bytes": whole, "lines": _lines_hash(asked["source"], done)})
    return done


def _lines_hash(source: str, count: int) -> str:
    """SHA-256 of the first lines of a file, white space around them left out."""
    found = hashlib.sha256()
    with Path(source).open("rb") as file:
        for line in itertools.islice(file, count):
            found.update(line.strip())
    return found.hexdigest()


def _write_progress(target: str, progress: dict[str, Any]) -> None:
    """Replace the file beside the target in one move."""
    part = Path(f"{target}.progress.part")
    part.write_text(json.dumps(progress))
    os.replace(part, f"{target}.progress")
