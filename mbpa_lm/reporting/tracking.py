"""Where the numbers of a run go: always a JSON-lines file in the run folder, and Weights & Biases if wanted."""

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mbpa_lm.config import TrackingConfig
from mbpa_lm.errors import RunFolderError, reason
from mbpa_lm.system.durable import lock_open_file
from mbpa_lm.system.progress import console

LOG_FILE = "log.jsonl"

LONGEST_ANSWER, LONGEST_GOODBYE = 60.0, 120.0
"""Seconds that Weights & Biases may take to begin a run or to take a record, and to send the rest of it in the end."""


def check_free(folder: Path) -> None:
    """Raise RunFolderError where another process is writing a run folder, before anything in it is read."""
    path = folder / LOG_FILE
    try:
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"run.folder {folder} is a file; name a folder")
        if path.is_file():
            with path.open("rb") as file:
                lock_open_file(file)
    except BlockingIOError:
        raise RunFolderError(f"run.folder {folder} is being written by another process; name another folder") from None
    except PermissionError:
        pass  # which is said when it is to be written
    except OSError as error:
        raise RunFolderError(f"run.folder {folder} cannot be written: {reason(error)}; name another folder") from None


class RunLog:
    """Writes each record to `RUN/log.jsonl` and to Weights & Biases.

    A tracker that fails is reported once and left alone; it never stops the run.
    """

    def __init__(
        self, folder: Path, tracking: TrackingConfig, job: str, config: Mapping[str, Any], silent: bool = False
    ) -> None:
        """Open the log of a `job`; a `silent` one writes nowhere, for processes that leave that to the first."""
        self._path = Path(os.devnull) if silent else folder / LOG_FILE
        self._artifacts = tracking.artifacts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not silent and os.path.lexists(self._path) and not stat.S_ISREG(self._path.lstat().st_mode):
                raise RunFolderError(f"{self._path} is a link, a pipe or a device; remove it, or name another run.folder")
            self._file = self._path.open("a", encoding="utf-8")
            if not silent:
                lock_open_file(self._file)
        except BlockingIOError:
            raise RunFolderError(f"run.folder {folder} is being written by another process; name another folder") from None
        except OSError as error:
            raise RunFolderError(f"run.folder {folder} cannot be written: {reason(error)}; name another folder") from None
        self._wandb: Any = None
        mode = _resolve(tracking.mode)
        if mode != "disabled" and not silent:
            self._wandb = _start_wandb(folder, mode, tracking.project, job, config)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record of plain values; `step` in it orders the curves on Weights & Biases."""
        self._keep(record)
        values = {key: value for key, value in record.items() if key != "step"}
        self._send(lambda run: run.log(values, step=record.get("step")))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Log the final numbers of the run, on Weights & Biases as its summary."""
        self._keep(values)
        self._send(lambda run: run.summary.update(dict(values)))

    def show(self, figures: Mapping[str, Path]) -> None:
        """Log pictures, which lie in files, to Weights & Biases."""

        def message(run: Any) -> None:
            import wandb

            run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})

        self._send(message)

    def show_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table to Weights & Biases."""

        def message(run: Any) -> None:
            import wandb

            run.log({f"tables/{name}": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        if self._artifacts:
            self._send(message)

    def keep_checkpoint(self, folder: Path, aliases: Sequence[str]) -> None:
        """Keep a checkpoint as an artifact of the run on Weights & Biases."""

        def message(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{run.id}-checkpoint", type="model", metadata={"folder": str(folder)})
            for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
                artifact.add_file(str(file), name=str(file.relative_to(folder)))
            run.log_artifact(artifact, aliases=list(aliases))

        if self._artifacts:
            self._send(message)

    def close(self) -> None:
        with suppress(OSError):  # a full disk; `write` has already said so
            self._file.close()
        self._send(lambda run: run.finish(), LONGEST_GOODBYE)

    def _keep(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFolderError(f"{self._path} cannot be written: {reason(error)}; what was saved before is whole") from None

    def _send(self, message: Callable[[Any], object], seconds: float = LONGEST_ANSWER) -> None:
        if self._wandb is None:
            return
        try:
            within(seconds, lambda: message(self._wandb))
        except Exception as error:  # whatever goes wrong in a tracker, the run goes on and the local log is whole
            self._wandb = None
            _report_tracker(error, self._path)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _resolve(mode: str) -> str:
    """Turn `auto` into online where the user is logged in, else offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path.home() / ".netrc"
    return "online" if netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace") else "offline"


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what a call returns; raises TimeoutError where it takes longer, and leaves it to itself."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return found[0]


def _start_wandb(folder: Path, mode: str, project: str, job: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb

        return within(
            LONGEST_ANSWER,
            lambda: wandb.init(
                project=project,
                name=f"{folder.name}-{job}",
                job_type=job,
                dir=folder,
                mode="online" if mode == "online" else "offline",
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=LONGEST_ANSWER),
            ),
        )
    except Exception as error:  # whatever goes wrong in a tracker, the run goes on and the local log is whole
        _report_tracker(error, folder / LOG_FILE)
        return None


def _report_tracker(error: Exception, log: Path) -> None:
    console.print(f"Weights & Biases is not available ({reason(error)}); numbers go to {log} only")
