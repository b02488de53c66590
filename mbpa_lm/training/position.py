"""How far a training run has come."""

import math
from dataclasses import dataclass, field
from typing import Any

from mbpa_lm.config.checks import check_types, require


@dataclass
class Position:
    """Steps taken, the best validation loss in nats a token, and the arithmetic that was chosen when the run began."""

    step: int = 0
    best_loss: float = math.inf
    epochs_without_gain: int = 0
    seconds: float = 0.0
    precision: str = "float32"
    validation_losses: list[float] = field(default_factory=list)


def read_position(values: dict[str, Any]) -> Position:
    """Return the position that a checkpoint's JSON names; raises ConfigError or one of DAMAGES where it is none."""
    check_types(Position, values)
    position = Position(**values)
    for name in ("step", "epochs_without_gain", "seconds"):
        require(name, getattr(position, name), 0 <= getattr(position, name) < math.inf, "0 or more")
    require("precision", position.precision, position.precision in ("float32", "bfloat16"), "float32 or bfloat16")
    return position
