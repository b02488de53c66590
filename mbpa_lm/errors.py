"""Errors that a user can do something about: one line each, saying what is wrong, where, and what to do.

The command lines print the line after `error:` and leave with `exit_code`; no traceback is shown.
"""

import difflib
import textwrap
from collections.abc import Collection

LONGEST_REASON = 300

DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading a file raises that is not what it should be."""


class MbpaError(Exception):
    """Base of every error that this package raises on bad input."""

    exit_code = 1


def reason(error: Exception) -> str:
    """Return what another library's error says, as one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...") or type(error).__name__


def did_you_mean(key: str, valid: Collection[str]) -> str:
    """Return the end of an error about an unknown key: the nearest valid one, or where to find them."""
    same_name = [name for name in valid if name.split(".")[-1] == key.split(".")[-1]]
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
    suggestion = next(iter(same_name + nearest), None)
    return f"did you mean {suggestion}?" if suggestion else "--help lists the valid ones"


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


class OutputError(MbpaError):
    """Standard output that cannot be written: a full disk behind it, or a pipe that nobody reads."""

    exit_code = 12


class Terminated(MbpaError):
    """A run that was asked to stop by SIGTERM, and has saved."""

    exit_code = 143


class DatastoreError(MbpaError):
    """A memory on disk or in a database that is missing, damaged, of another model, or cannot be written."""

    exit_code = 7


class AdaptationError(MbpaError):
    """Settings under which the adapted softmax layer stops being finite, or that no solver offers."""

    exit_code = 5


class ModelError(MbpaError):
    """A model that cannot have a memory."""

    exit_code = 8


class NumericalError(MbpaError):
    """A number that is no probability, or a prediction that is not the same when it is made again."""

    exit_code = 9
