"""Where the numbers of a run go: always a JSON-lines file in the run folder, and Weights & Biases if wanted."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LOG_FILE = "log.jsonl"


class RunLog:
    """Writes each record to `RUN/log.jsonl` and to Weights & Biases.

    A tracker that fails is reported once and left alone; it never stops the run.
    """

    def __init__(self, folder: Path, mode: str, project: str, job: str, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOG_FILE).open("a", encoding="utf-8")
        self._wandb: Any = None
        mode = _resolve(mode)
        if mode != "disabled":
            self._wandb = _start_wandb(folder, mode, project, job, config)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record of plain values; `step` in it orders the curves on Weights & Biases."""
        self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if key != "step"}, step=record.get("step"))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set the final numbers of the run on Weights & Biases."""
        if self._wandb is not None:
            self._wandb.summary.update(dict(values))

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(quiet=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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


def _start_wandb(folder: Path, mode: str, project: str, job: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb

        return wandb.init(
            project=project,
            name=f"{folder.name}-{job}",
            job_type=job,
            dir=folder,
            mode="online" if mode == "online" else "offline",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # whatever goes wrong in a tracker, the run goes on and the local log is whole
        print(f"Weights & Biases is not available ({str(error).splitlines()[0]}); numbers go to {folder / LOG_FILE} only")
        return None
