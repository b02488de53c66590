"""What `evaluate.py --tune` fitted, kept with the checkpoint as adaptation.json, and how it enters the configuration."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mbpa_lm.checkpoint import replace_json
from mbpa_lm.config import Config
from mbpa_lm.errors import CheckpointError, MbpaError, RunFolderError, reason

FILE = "adaptation.json"
FORMAT = 1


@dataclass(frozen=True)
class FittedAdaptation:
    """Settings of the local adaptation, in the units of AdaptationConfig, and what they gave on held-out validation tokens."""

    neighbours: int
    alpha: float
    schedule: list[float]
    beta: float
    kernel: Literal["inverse_distance", "gaussian"]
    epsilon: float
    bandwidth: float
    reach: float
    bias: bool
    metric: list[float]
    stream: str
    examples: int
    losses: dict[str, float]  # nats a token on examples that nothing was fitted on: base, configured, best grid point, fitted

    def apply(self, config: Config) -> Config:
        """Return the configuration with the fitted settings in the place of its own."""
        adaptation = replace(
            config.adaptation,
            steps=len(self.schedule),
            alpha=self.alpha,
            schedule=self.schedule,
            beta=self.beta,
            kernel=self.kernel,
            epsilon=self.epsilon,
            bandwidth=self.bandwidth,
            weighting="within_reach",
            reach=self.reach,
            bias=self.bias,
            optimizer="sgd",
            selection="nearest",
        )
        return replace(config, adaptation=adaptation, memory=replace(config.memory, neighbours=self.neighbours))

    def metric_tensor(self) -> Tensor:
        """Return the metric as (d,)."""
        return torch.tensor(self.metric)


def save_fitted(folder: Path, fitted: FittedAdaptation) -> Path:
    """Write adaptation.json into a checkpoint's folder, whole or not at all. Raises RunFolderError where it cannot."""
    path = folder / FILE
    try:
        replace_json(path, {"format": FORMAT, **asdict(fitted)})
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}; an earlier one is untouched") from None
    return path


def load_fitted(folder: Path, hidden_size: int) -> FittedAdaptation | None:
    """Return what is kept with a checkpoint, None where nothing is. Raises CheckpointError where it cannot be used."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        fitted = FittedAdaptation(**values)
        if len(fitted.metric) != hidden_size or not all(number > 0 for number in fitted.metric):
            raise ValueError(f"its metric is not {hidden_size} positive numbers")
        fitted.apply(Config())  # checks the values as any configuration's
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MbpaError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {reason(error)}; delete it, or leave it aside with --adaptation.fitted false"
        ) from None
    return fitted
