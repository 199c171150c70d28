"""Per-token log-probs of the reference on disk, and the names they are found by.

A value depends on the tokens of one completion and on what computed it, and on nothing else: a run with another
learning rate, rank, seed, order, subset or loss finds what an earlier one stored.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_dpo.errors import FixableError

APPLICATION_ID = int.from_bytes(b"qdpo", "big")
"""What SQLite keeps in a file's header to tell whose it is."""

SCHEMA_VERSION = 1
"""Version of the table below, in `PRAGMA user_version`."""

SCHEMA = """
    CREATE TABLE logps (
        identity TEXT NOT NULL, key TEXT NOT NULL, dtype TEXT NOT NULL, crc32 INTEGER NOT NULL, value BLOB NOT NULL,
        PRIMARY KEY (identity, key)
    )
"""

BUSY_SECONDS = 60.0
"""How long a call waits for another process."""

MAX_PLACEHOLDERS = 500
"""Most keys of one query; old builds of SQLite take 999 placeholders."""

STORED_DTYPES = {np.dtype(np.float32): "<f4", np.dtype(np.float64): "<f8"}

ROW_WORDS = 2**16
"""32-bit words that are summed up to one row of a tensor's digest; what is done to a row fits a core's cache."""

CPU_ROWS, DEVICE_ROWS = 1, 64
"""Rows that are taken at once; 64 are 2**22 words, in temporaries of 32 MiB."""


class LogpsCache:
    """Per-token log-probs in one SQLite file, which processes and threads may share.

    Each call opens the file and closes it: no connection lives on to be forked, pickled or left behind when the file
    is deleted. A `put` is one transaction, so a killed process loses the one it was in, and no other.

    Args:
        path: The file; it and its parents are created.

    Raises:
        FixableError: If the file is damaged, not a cache, of a newer version, or cannot be opened. Each call may.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open():
            pass

    def get(self, identity: str, keys: Sequence[str]) -> list[np.ndarray | None]:
        """The values of some keys.

        Args:
            identity: What computed the values.
            keys: One name per completion.

        Returns:
            Per key `(tokens,)` nats, the bits and the dtype that were put, or None if there is no value.
        """
        found: dict[str, np.ndarray] = {}
        with self._open() as connection:
            for start in range(0, len(keys), MAX_PLACEHOLDERS):
                some = keys[start : start + MAX_PLACEHOLDERS]
                query = "SELECT key, dtype, crc32, value FROM logps WHERE identity = ? AND key IN ({})"
                rows = connection.execute(query.format(", ".join("?" * len(some))), (identity, *some))
                found |= {key: self._decode(dtype, crc32, blob) for key, dtype, crc32, blob in rows}
        return [found.get(key) for key in keys]

    def put(self, identity: str, keys: Sequence[str], values: Sequence[np.ndarray]) -> None:
        """Store values, all or none; one that is there already is kept.

        Args:
            identity: What computed the values.
            keys: One name per completion.
            values: Per key `(tokens,)` nats, float32 or float64.

        Raises:
            TypeError: If a value has another dtype.
            ValueError: If a value has another number of dimensions, or there is not one per key.
        """
        if len(keys) != len(values):
            raise ValueError(f"`values` must hold one per key, got {len(values)} for {len(keys)} keys. Pass as many.")
        rows = [(identity, key, *_encode(value)) for key, value in zip(keys, values, strict=True)]
        with self._open() as connection, _writing(connection):
            connection.executemany("INSERT INTO logps VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", rows)

    def __len__(self) -> int:
        with self._open() as connection:
            return int(connection.execute("SELECT count(*) FROM logps").fetchone()[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection to a file of this version, with errors that name the file."""
        try:
            # The rollback journal, SQLite's default: the faster WAL needs memory that all processes share, so it breaks
            # where hosts share a network file system. Its default `synchronous=FULL` survives a power cut, too.
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                self._check(connection)
                yield connection
        except sqlite3.OperationalError as error:  # no permission, no space, locked for too long
            rule = f"`path` must be a file that can be read and written, got '{error}' from {self.path}."
            raise FixableError(f"{rule} Name another file.") from error
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._unreadable() from error
            raise

    def _check(self, connection: sqlite3.Connection) -> None:
        """Create the table in an empty file; refuse a foreign or a newer one."""
        if not _pragma(connection, "application_id"):
            with _writing(connection):  # another process may be creating it, so look again under the lock
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    connection.execute(SCHEMA)
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        if _pragma(connection, "application_id") != APPLICATION_ID:
            raise self._unreadable()
        if (version := _pragma(connection, "user_version")) > SCHEMA_VERSION:
            rule = f"`path` must be a cache of version {SCHEMA_VERSION} or older, got version {version} in {self.path}."
            raise FixableError(f"{rule} Upgrade the package or name another file.")

    def _decode(self, dtype: str, crc32: int, blob: bytes) -> np.ndarray:
        """A value from its row; SQLite has no checksums of its own."""
        if zlib.crc32(blob) != crc32:
            raise self._unreadable()
        values = np.frombuffer(blob, dtype)
        return values.astype(values.dtype.newbyteorder("="))  # and a copy, which may be written to

    def _unreadable(self) -> FixableError:
        rule = f"`path` must be a cache of reference log-probs, got a damaged or foreign file {self.path}."
        return FixableError(f"{rule} Delete it if it is a cache, else name another file.")


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction, committed or rolled back; it locks at once, as a reader that starts to write would not wait."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _encode(value: np.ndarray) -> tuple[str, int, bytes]:
    """Dtype, checksum and bytes of a value, little endian; its length is the bytes' by the dtype."""
    if value.dtype not in STORED_DTYPES:
        raise TypeError(f"`values` must be float32 or float64, got {value.dtype}. Convert them.")
    if value.ndim != 1:
        raise ValueError(f"`values` must be one-dimensional, got shape {value.shape}. Pass one row per completion.")
    dtype = STORED_DTYPES[value.dtype]
    blob = value.astype(dtype).tobytes()
    return dtype, zlib.crc32(blob), blob


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """SHA-256 of the tokens of a completion and its prompt; where one ends and the other starts counts."""
    prompt, completion = np.asarray(prompt_ids, dtype="<i8"), np.asarray(completion_ids, dtype="<i8")
    length = np.asarray(len(prompt), dtype="<i8")
    return hashlib.sha256(length.tobytes() + prompt.tobytes() + completion.tobytes()).hexdigest()


def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and contents of tensors, in whatever order they come.

    Contents are digested where they are: 16 bytes per 256 KiB leave the device. Two tensors that differ in one 32-bit
    word always differ here; others agree with a probability of at most 2**-64.

    Args:
        tensors: Names and tensors, on any device.

    Returns:
        64 hexadecimal digits, the same on every device.

    Raises:
        ValueError: If a tensor is on the meta device.
    """
    described = []
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"`tensors` must hold their values, got {name!r} on the meta device. Load it.")
        described.append((name, str(tensor.dtype), list(tensor.shape), _content_digest(tensor)))
    return hashlib.sha256(json.dumps(sorted(described)).encode()).hexdigest()


def _content_digest(tensor: Tensor) -> str:
    """SHA-256 over sums of a tensor's words, each times a random odd number of its place, modulo 2**64.

    Such sums are exact in any order. A changed word changes its sum, as the change is less than 2**32 and its factor
    odd. A factor hits one value modulo 2**64 / 2**32 by chance, so two sums miss other changes once in 2**64.

    Source: Lemire and Kaser, Strongly universal string hashing is fast (2014), MULTILINEAR.
    """
    elements = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    data = elements.view(torch.uint8)
    factors = _odd_factors(data.device)
    row_bytes, rows_at_once = 4 * ROW_WORDS, CPU_ROWS if data.device.type == "cpu" else DEVICE_ROWS
    # Filled in place: results kept one by one would lie between the temporaries and stop the heap from reusing them.
    sums = data.new_empty((-(-len(data) // row_bytes), 2), dtype=torch.int64)
    for chunk, rows in zip(data.split(rows_at_once * row_bytes), sums.split(rows_at_once), strict=True):
        aligned = F.pad(chunk, (0, -len(chunk) % row_bytes))  # a copy: a slice's first byte may lie anywhere
        words = aligned.view(torch.int32).view(-1, ROW_WORDS).to(torch.int64)
        for column, factor in enumerate(factors):
            rows[:, column] = (words * factor).sum(dim=1)
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()


@cache
def _odd_factors(device: torch.device) -> Tensor:
    """`(2, ROW_WORDS)` odd int64, the same on every machine."""
    noise = np.frombuffer(hashlib.shake_256(b"qlora_dpo").digest(16 * ROW_WORDS), dtype="<i8")
    return torch.from_numpy((noise | 1).astype(np.int64)).view(2, ROW_WORDS).to(device)


def default_cache_path() -> str:
    """`<HF_HOME>/qlora_dpo/reference_logps.sqlite`, by what `HF_HOME` is now."""
    from huggingface_hub import constants

    return str(Path(constants.HF_HOME, "qlora_dpo", "reference_logps.sqlite"))
