"""What a person sees at the command line beside a command's own lines: warnings as one line, and none about others."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def hush_bitsandbytes() -> None:
    """Leave out what bitsandbytes says, when it is imported on a CPU, of a kernel that it cannot load.

    It asks for a package that would change nothing: `keep_one_arithmetic` switches that kernel off.
    """
    kernel = "Failed to load CPU gemm_4bit_forward"
    ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
    ops.addFilter(lambda record: not record.getMessage().startswith(kernel))


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as one line without file and source line, inside the block; its filters end with it."""
    before = warnings.formatwarning
    with warnings.catch_warnings():
        # PEFT reads it of every model it wraps; nothing that a user could change
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.formatwarning = _one_line  # what records warnings, as pytest does, is left as it is
        try:
            yield
        finally:
            warnings.formatwarning = before


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"qlora-dpo: warning: {' '.join(str(message).split())}\n"
