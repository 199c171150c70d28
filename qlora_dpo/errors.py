"""The ends of a run that are neither a bad value nor a bug: the message says how to put things right, or go on."""

import contextlib
from collections.abc import Iterator

import torch

_WORDS = "out of memory", "can't allocate memory", "cublas_status_alloc_failed"


class FixableError(RuntimeError):
    """Something that the caller can put right; the command line shows its message without a traceback."""


class OutOfMemoryError(FixableError):
    """Memory ran out on a forward that cannot be cut any further."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left: CUDA's own class, and the words of other allocators."""
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(said in words for said in _WORDS)
    )


@contextlib.contextmanager
def memory_said(when: str, way_out: str) -> Iterator[None]:
    """Where memory runs out in the block, one error that says when, and the way out.

    Raises:
        OutOfMemoryError: In place of the allocator's own.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemoryError(f"Memory ran out {when}, got: {got}. {way_out}") from error


class PushError(FixableError):
    """An upload that failed. What was to be uploaded lies where it was."""


class StoppedError(Exception):
    """A command that Ctrl-C stopped; the message says how it goes on."""
