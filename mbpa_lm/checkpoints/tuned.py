"""What `evaluate.py --tune` found, kept with the checkpoint as tuned.json, and how it enters the configuration."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbpa_lm.config import Config
from mbpa_lm.errors import DAMAGES, CheckpointError, MbpaError, RunFolderError, reason
from mbpa_lm.system.durable import read_json, replace_json, take_lock

FILE = "tuned.json"
LOCK = ".tuning.lock"
FORMAT = 1


@dataclass(frozen=True)
class Tuned:
    """Settings that were best on a validation text, and how much better."""

    stream: str
    settings: dict[str, dict[str, Any]]  # section of the configuration -> key -> value
    metric: list[float] | None  # of the memory's search, one positive number a number of the hidden state
    weights: dict[str, float]  # of each expert, and of the uniform distribution, in a fixed mixture
    losses: dict[str, dict[str, float]]  # what was tuned -> "base", "configured", "tuned", ... -> nats a token, on that text

    def apply(self, config: Config) -> Config:
        """Return the configuration with these settings in the place of its own. Raises ConfigError where one is impossible."""
        sections = {name: replace(getattr(config, name), **values) for name, values in self.settings.items()}
        return replace(config, **sections)

    def metric_tensor(self) -> Tensor | None:
        """Return the metric as (d,)."""
        return None if self.metric is None else torch.tensor(self.metric)

    def over(self, earlier: "Tuned | None") -> "Tuned":
        """Return these settings and, for what was not tuned this time, the earlier ones."""
        if earlier is None:
            return self
        return replace(
            self,
            settings={**earlier.settings, **self.settings},
            metric=self.metric if "adaptation" in self.settings else earlier.metric,
            losses={**earlier.losses, **self.losses},
        )


@contextmanager
def being_tuned(folder: Path) -> Iterator[None]:
    """Keep other processes from tuning the same checkpoint: each adds to what the others have found.

    Raises RunFolderError where another one does, or where the folder cannot be written.
    """
    try:
        lock = take_lock(folder / LOCK)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {reason(error)}; tune a copy of the run") from None
    if lock is None:
        raise RunFolderError(f"{folder} is being tuned by another process; wait until it is done")
    try:
        yield
    finally:
        os.close(lock)


def save_tuned(folder: Path, tuned: Tuned) -> Path:
    """Write tuned.json into a checkpoint's folder, whole or not at all. Raises RunFolderError where it cannot."""
    path = folder / FILE
    try:
        replace_json(path, {"format": FORMAT, **asdict(tuned)})
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}; an earlier one is untouched") from None
    return path


def load_tuned(folder: Path, hidden_size: int) -> Tuned | None:
    """Return what is kept with a checkpoint, None where nothing is. Raises CheckpointError where it cannot be used."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = read_json(path)
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tuned = Tuned(**values)
        if tuned.metric is not None and not (len(tuned.metric) == hidden_size and all(number > 0 for number in tuned.metric)):
            raise ValueError(f"its metric is not {hidden_size} positive numbers")
        if not all(weight >= 0 for weight in tuned.weights.values()):
            raise ValueError("a weight of the mixture is negative")
        tuned.apply(Config())  # checks the values as any configuration's
    except (*DAMAGES, MbpaError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {reason(error)}; delete it, or leave it aside with --evaluation.tuned false"
        ) from None
    return tuned
