"""The ends of a run that are neither a bad value nor a bug: the message says how to put things right, or go on."""


class FixableError(RuntimeError):
    """Something that the caller can put right; the command line shows its message without a traceback."""


class OutOfMemoryError(FixableError):
    """Memory ran out on a forward that cannot be cut any further."""


class PushError(FixableError):
    """An upload that failed. What was to be uploaded lies where it was."""


class StoppedError(Exception):
    """A command that Ctrl-C stopped; the message says how it goes on."""
