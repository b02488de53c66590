"""What a solver is asked to do (Sprechmann et al. 2018, section 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from mbpa_lm.errors import AdaptationError


@dataclass(frozen=True)
class AdaptationRule:
    """`steps` gradient steps from the trained layer `theta`, on

        J(theta') = - sum_k w_k log p(v_k | h_k, theta') + beta / 2 * ||theta' - theta||^2

    where theta is the output layer's weight, and its bias if `adapt_bias`. Step t has size alpha * schedule[t].
    """

    steps: int
    alpha: float
    beta: float = 0.0
    optimizer: str = "sgd"  # or momentum, rmsprop, adam
    momentum: float = 0.9  # of momentum: v <- momentum v + gradient, theta <- theta - alpha v
    adapt_bias: bool = True
    schedule: tuple[float, ...] | None = None  # one number a step; None is all ones

    def step_sizes(self) -> list[float]:
        """Return the size of each step. Raises AdaptationError where the schedule has another length."""
        if self.schedule is None:
            return [self.alpha] * self.steps
        if len(self.schedule) != self.steps:
            raise AdaptationError(f"the schedule has {len(self.schedule)} numbers for {self.steps} steps; give one a step")
        return [self.alpha * share for share in self.schedule]

    @property
    def velocity_kept(self) -> float:
        """Share of the last step's direction that the next one goes on in."""
        return self.momentum if self.optimizer == "momentum" else 0.0

    def require(self, solver: str, offered: Sequence[str]) -> None:
        """Raise AdaptationError unless the solver offers the optimizer."""
        if self.optimizer not in offered:
            raise AdaptationError(
                f"the {solver} solver takes {', '.join(offered)}, not {self.optimizer!r}; "
                f"adaptation.solver reference takes sgd, momentum, rmsprop, adam"
            )
