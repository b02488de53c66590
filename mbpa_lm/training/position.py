"""How far a training run has come."""

import math
from dataclasses import dataclass, field


@dataclass
class Position:
    """Steps taken, the best validation loss in nats a token, and the arithmetic that was chosen when the run began."""

    step: int = 0
    best_loss: float = math.inf
    epochs_without_gain: int = 0
    seconds: float = 0.0
    precision: str = "float32"
    validation_losses: list[float] = field(default_factory=list)
