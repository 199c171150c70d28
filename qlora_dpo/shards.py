"""Safetensors files of a model, read and written a tensor at a time.

A shard gets its final name when all are written, so that a folder that was cut off is never taken for a whole model.
"""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

_PART = re.compile(r"model-\d{5}\.part")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the format spells them."""
_ENTRY = 192
"""Bytes that are more than a tensor's entry in a header takes besides its name: two offsets, a shape and the keys."""


def size_in_bytes(size: str | int) -> int:
    """Bytes that a size such as `2GB` (decimal) or `512MiB` (binary) names.

    >>> size_in_bytes("1.5KB")
    1500

    Raises:
        ValueError: If it is no size above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", str(size).upper())
    count = int(float(found[1]) * _UNITS.get(found[2] or "B", 0)) if found else 0
    if count < 1:
        raise ValueError(f"`max_shard_size` must be a size such as 2GB or 500MB, got {size!r}. Use 2GB.")
    return count


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model on disk.

    Attributes:
        source: Folder or Hub id.
        files: The file that each tensor is in, by the tensor's name.
    """

    source: str
    files: dict[str, str]

    def names(self) -> list[str]:
        """Every weight, in the order of the files; constants of a 4-bit weight belong to it and are left out."""
        return [name for name in self.files if self._owner(name) is None]

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def packed(self, name: str) -> bool:
        """Whether a weight is stored in 4 bit."""
        return any(key.startswith(f"{name}.quant_state.") for key in self.files)

    def dequantized(self, name: str) -> Tensor:
        """A weight that is stored in 4 bit, `(out, in)` in the dtype it was quantised from."""
        constants: dict[str, Any] = {key: self.tensor(key) for key in self.files if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(constants, device=torch.device("cpu"))
        return bnb.dequantize_4bit(self.tensor(name), state)

    def _owner(self, name: str) -> str | None:
        """The 4-bit weight that a tensor is a constant of."""
        owner = f"{name.rpartition('.weight.')[0]}.weight"
        return owner if owner in self.files and name != owner else None


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """The safetensors files of a folder, or of a Hub id (downloaded if they are not in the cache).

    Raises:
        FileNotFoundError: If there are none.
    """
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is not None:
        paths, _ = get_checkpoint_shard_files(source, index, revision=revision)
    else:
        whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
        paths = [] if whole is None else [whole]
    if not paths:
        raise FileNotFoundError(
            f"The base model must be in safetensors files, got none in {source}. Load it and save it again with "
            "save_pretrained."
        )
    files: dict[str, str] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), str(path))
    return Checkpoint(source, files)


def weight_files(folder: str | Path) -> Iterator[Path]:
    """What a `ShardWriter` has written into a folder, whole or cut off."""
    for path in Path(folder).iterdir():
        if _PART.fullmatch(path.name) or _SHARD.fullmatch(path.name):
            yield path


class ShardWriter:
    """Writes tensors in the order they come, straight to disk.

    The header of a safetensors file stands in front of its tensors and names them all, so room is left for it, which is
    filled in when the shard is full; the format allows blanks behind it.
    """

    def __init__(self, folder: str | Path, max_bytes: int, names: Sequence[str]) -> None:
        """Begin. `names` are those of the tensors to come, or most of them: the header's room is made for these."""
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.total_bytes, self.total_numbers = 0, 0
        self._room = 8 * (sum(len(name.encode()) + _ENTRY for name in names) // 8 + 128)
        self._parts: list[dict[str, Any]] = []
        self._offset = 0
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; one that does not fit into the open shard begins the next."""
        size = tensor.numel() * tensor.element_size()
        if 8 + self._room + self._offset + size > self.max_bytes or self._offset % tensor.element_size():
            self._finish()
        if self._file is None:
            self._parts.append({"__metadata__": {"format": "pt"}})
            self._file, self._offset = self._part(len(self._parts)).open("wb"), 0
            self._file.seek(8 + self._room)
        ends = [self._offset, self._offset + size]
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        self._parts[-1][name] = entry
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._offset = ends[1]
        self.total_bytes, self.total_numbers = self.total_bytes + size, self.total_numbers + tensor.numel()

    def close(self) -> int:
        """Fill in the last header, give the shards their names and write the index; returns how many there are."""
        self._finish()
        count = len(self._parts)
        weight_map: dict[str, str] = {}
        for number, entries in enumerate(self._parts, 1):
            final = SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._part(number).replace(self.folder / final)
            weight_map |= {name: final for name in entries if name != "__metadata__"}
        if count > 1:
            metadata = {"total_size": self.total_bytes, "total_parameters": self.total_numbers}
            index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n")
        return count

    def _part(self, number: int) -> Path:
        return self.folder / f"model-{number:05}.part"

    def _finish(self) -> None:
        """Put the header of the open shard in its place."""
        if self._file is None:
            return
        header = json.dumps(self._parts[-1], separators=(",", ":")).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        self._file, self._offset = None, 0
