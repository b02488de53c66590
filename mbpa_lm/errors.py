"""Errors that a user can do something about: one line each, saying what is wrong, where, and what to do.

The command lines print the line after `error:` and leave with `exit_code`; no traceback is shown.
"""


class MbpaError(Exception):
    """Base of every error that this package raises on bad input."""

    exit_code = 1


def reason(error: Exception) -> str:
    """Return the one line of another library's error that says what happened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__


class ConfigError(MbpaError):
    """A configuration that cannot be run: an unknown key, a wrong type, an impossible value."""

    exit_code = 2


class DataError(MbpaError):
    """Text or token files that cannot be read as what they should be."""

    exit_code = 3


class CheckpointError(MbpaError):
    """A checkpoint that is missing, damaged, cannot be written, or belongs to something else."""

    exit_code = 4


class RunFolderError(MbpaError):
    """A run folder that cannot be written: no right to, or no space."""

    exit_code = 6


class AdaptationError(MbpaError):
    """Settings under which the adapted softmax layer stops being finite, or that no solver offers."""

    exit_code = 5
