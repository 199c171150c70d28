"""The ends of a run that are neither a bad value nor a bug: the message says how to put things right, or go on."""

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


class PushError(FixableError):
    """An upload that failed. What was to be uploaded lies where it was."""


class StoppedError(Exception):
    """A command that Ctrl-C stopped; the message says how it goes on."""
