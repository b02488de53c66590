"""Progress on the terminal: a live bar where someone watches, a line now and then where output goes to a file."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mbpa_lm.errors import OutputError, reason


class _Output(io.TextIOBase):
    """Where output goes at the moment; one that is full, or that nobody reads any more, is an error of its own."""

    def write(self, text: str) -> int:
        with self._said():
            return sys.stdout.write(text)
        return 0

    def flush(self) -> None:
        with self._said():
            sys.stdout.flush()

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still to be flushed at the end goes nowhere
            raise OutputError(
                f"output could not be written ({reason(error)}); send it elsewhere, what was saved before is whole"
            ) from None

    def isatty(self) -> bool:
        return sys.stdout.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding


console = Console(file=cast(IO[str], _Output()), highlight=False, soft_wrap=True)

SECONDS_BETWEEN_LINES = 20.0


def counted(count: int, noun: str) -> str:
    """Return a number of things in words, one of them without the plural's s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class ProgressBar:
    """Counts work done out of a total, with a note beside it.

    `total` None is for work whose size is not known before.
    """

    def __init__(self, what: str, total: int | None, unit: str = "tokens") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._note = 0, ""
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressBar":
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self._what, total=self._total, note="")
            self._bar.start()
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Add `count` units of work done."""
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._text())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.print(f"{self._what}: {self._text()}")

    def reach(self, done: int, note: str = "") -> None:
        """Say that `done` units have been made so far."""
        self.advance(done - self._done, note)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        share = f"{self._done / self._total:4.0%} of {self._total:,}" if self._total else f"{self._done:,}"
        text = f"{share} {self._unit}, {self._done / seconds:,.0f}/s"
        if self._total and self._done and self._bar is None:  # a bar shows the time left itself
            text += f", {_duration(seconds / self._done * (self._total - self._done))} left"
        return f"{text}, {self._note}" if self._note else text

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def token_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many tokens have been made so far, out of an unknown number."""
    with ProgressBar(what, None) as bar:
        yield bar.reach
