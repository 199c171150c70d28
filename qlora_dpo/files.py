"""From files and the Hub to rows of preference data, the texts of a file as they were written."""

import codecs
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from qlora_dpo.preferences import PAIR_VALUES, TEXT_COLUMNS, USED_COLUMNS, decoded

_SAVED_TO_DISK = ("state.json", "dataset_info.json")
"""What `save_to_disk` writes beside the rows of a data set."""

_NO_NUMBER = ["", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "null", "NULL", "None"]
"""What stands in number columns of .csv files where there is none; in a text each is a text."""
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(path_or_id: str, split: str = "train", name: str | None = None) -> Dataset:
    """A data set from a local file, a local folder or the Hub.

    Args:
        path_or_id: A .jsonl, .json, .parquet or .csv file, a folder of them, or a Hub id.
        split: Split to load; slices such as `train[:250]` are understood.
        name: Configuration of a Hub data set.

    Raises:
        FileNotFoundError: If it looks like a local path and is not there.
        ValueError: If a file's type is not known, or it is not what its type says; a line at fault is named.
    """
    path = Path(path_or_id).expanduser()
    _require_readable(path, name)
    try:
        if path.is_file():
            return _load_file(path, split)
        return _load(path_or_id, path, split, name)
    except (ValueError, DatasetGenerationError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"A data set must have rows, got none in {split!r} of {path_or_id}. Widen it.") from error
        if path.is_file() and "Unknown split" in str(error):
            raise ValueError(
                f"A data file has one split, `train`, got {split!r}. Use slices of it, such as 'train[:90%]' and "
                "'train[90%:]'."
            ) from error
        for file in [path] if path.is_file() else sorted(path.rglob("*.json*")):
            _require_json(file)
        if isinstance(error, ValueError) and not isinstance(error, ArrowInvalid):
            raise
        raise ValueError(
            f"The data set {path_or_id} must be rows of one form, got: {error.__cause__ or error}. Correct it."
        ) from error


def _require_readable(path: Path, name: str | None) -> None:
    """Refuse what is known to be no data set before it is read.

    Raises:
        ValueError: If it is an empty file, one of another type or with a configuration, or a folder of `save_to_disk`.
    """
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"A data file must have rows, got none in {path}. Check how it was written.")
        if path.suffix not in _FILE_TYPES:
            raise ValueError(f"A data file must end in one of {sorted(_FILE_TYPES)}, got {path}. Convert it.")
        if name is not None:
            raise ValueError(f"A data file must be loaded without a configuration, got {name!r}. Leave it out.")
    if all(Path(path, file).is_file() for file in _SAVED_TO_DISK):
        raise ValueError(
            f"A folder must hold files of {sorted(_FILE_TYPES)}, got {path}, which `save_to_disk` wrote. Write the "
            "rows with `to_parquet` instead."
        )


def _load_file(path: Path, split: str) -> Dataset:
    """A file, its texts as they are: pandas takes `None` and `NA` for no value, pyarrow takes dates for times."""
    kind = _FILE_TYPES[path.suffix]
    if kind == "csv":
        return _with_messages(load_dataset(kind, data_files=glob.escape(str(path)), split=split, **_csv_options()))
    rows = load_dataset(kind, data_files=glob.escape(str(path)), split=split)
    times = [name for name, feature in rows.features.items() if _has_times(feature)] if kind == "json" else []
    return _with_texts(path, times, split) if times else rows


def _csv_options() -> dict[str, Any]:
    """How pandas is to read a .csv file: at once, or a column's type would be that of its first rows, and texts as they
    are, also where a column has nothing but numbers or `True`.
    """
    numbers = {*PAIR_VALUES, "ref_chosen_logps", "ref_rejected_logps"}
    none = {name: _NO_NUMBER if name in numbers else [""] for name in USED_COLUMNS}
    texts = dict.fromkeys((*TEXT_COLUMNS, "subset"), _text_or_none)
    return {"keep_default_na": False, "na_values": none, "converters": texts, "chunksize": None}


def _text_or_none(text: str) -> str | None:
    """A cell of a .csv file as it is; None of an empty one."""
    return text or None


def _with_messages(rows: Dataset) -> Dataset:
    """Rows of .csv files, with messages where the first text of a column that is no empty list is a list of them."""
    there = [name for name in TEXT_COLUMNS if name in rows.column_names]
    names = [name for name in there if _holds_messages(next((text for text in rows[name] if text not in _EMPTY), None))]
    return rows.map(lambda row: {name: decoded(row[name], name) for name in names}) if names else rows


_EMPTY = (None, "[]")
"""Cells that tell neither texts from messages."""


def _has_times(feature: Any) -> bool:
    """Whether a column, or what is in it, was read as dates or times."""
    if isinstance(feature, Value):
        return feature.dtype.startswith(("timestamp", "date", "time"))
    inside = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return any(_has_times(one) for one in inside if one is not None)


def _with_texts(path: Path, names: Sequence[str], split: str) -> Dataset:
    """The rows of a JSON file, some columns as their text stands there."""
    whole = load_dataset("json", data_files=glob.escape(str(path)), split="train")
    raw = _json_rows(path)
    for name in names:
        column = Dataset.from_list([{name: row.get(name)} for row in raw])
        whole = whole.remove_columns(name).add_column(name, column.data.column(name))
    if split == "all":
        return whole
    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
    return whole.select([i for part in parts for i in range(part.from_, part.to)])


def _holds_messages(text: Any) -> bool:
    """Whether a text is a list of messages as JSON."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return False
    return isinstance(found, list) and all(isinstance(one, dict) and {"role", "from"} & set(one) for one in found)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file, of lines or one list."""
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if text.lstrip()[:1] == b"[":
        return json.loads(text)
    return [json_row(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _load(path_or_id: str, path: Path, split: str, name: str | None) -> Dataset:
    """A folder or a data set of the Hub."""
    looks_local = path.suffix in _FILE_TYPES or path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1
    if looks_local and not path.is_dir():
        raise FileNotFoundError(f"The data set must be a file, a folder or a Hub id, got {path}. Check the path.")
    if not path.is_dir():
        return load_dataset(path_or_id, name, split=split)
    kinds = {_FILE_TYPES[file.suffix] for file in path.rglob("*") if file.suffix in _FILE_TYPES}
    if kinds == {"csv"}:
        return _with_messages(load_dataset(str(path), name, split=split, **_csv_options()))
    rows = load_dataset(str(path), name, split=split)
    times = [name for name in TEXT_COLUMNS if name in rows.column_names and _has_times(rows.features[name])]
    if times:
        raise ValueError(f"`{times[0]}` must be text, got dates in the files of {path}. Name the file by itself.")
    return rows


def _require_json(path: Path) -> None:
    """Name the first line of a JSON file that is at fault, if it is one and one is.

    Raises:
        ValueError: If so.
    """
    if _FILE_TYPES.get(path.suffix) != "json":
        return
    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(1) == b"[":
            try:
                json.loads(path.read_bytes())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Line {error.lineno} of {path} must be JSON, got: {error.msg}. Correct it."
                ) from error
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                json_row(line, number, path)


def json_row(line: bytes, number: int, source: str | Path) -> dict[str, Any]:
    """A line of a .jsonl file as a row.

    Raises:
        ValueError: If it is no JSON object; it names the file and the number of the line, from 1.
    """
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"Line {number} of {source} must be a JSON object, got {line.strip()[:40]!r}. Correct it.")
    return row
