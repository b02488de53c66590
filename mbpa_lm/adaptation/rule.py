"""What a solver is asked to do (Sprechmann et al. 2018, section 2.2)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptationRule:
    """`steps` gradient steps of size `alpha` from the trained layer `theta`, on

        J(theta') = - sum_k w_k log p(v_k | h_k, theta') + beta / 2 * ||theta' - theta||^2

    where theta is the output layer's weight, and its bias if `adapt_bias`.
    """

    steps: int
    alpha: float
    beta: float = 0.0
    optimizer: str = "sgd"  # or rmsprop
    adapt_bias: bool = True
