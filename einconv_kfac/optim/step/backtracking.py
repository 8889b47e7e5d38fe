"""What becomes of a step after which the objective has grown on the step's own batch."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction

SHORTENING = 0.25
"""Factor by which it is shortened."""
SHORTENINGS = 8
"""How often, at most; a step after which the objective has still grown then is taken back."""


def shorten_(objective: Objective, replay: Replay, update: Direction, allowed: Tensor) -> float:
    """Shorten a step until the objective is allowed, or else take it back.

    Args:
        objective: The objective; its parameters are those after the step.
        replay: Evaluates the objective again.
        update: The step; it is shortened in place.
        allowed: The largest value that is.

    Returns:
        The fraction of the step that is left.
    """
    fraction = 1.0
    for _ in range(SHORTENINGS):
        _scale_(objective, update, SHORTENING)
        fraction *= SHORTENING
        if bool(objective.value_again(replay) <= allowed):
            return fraction
    _scale_(objective, update, 0.0)
    return 0.0


def _scale_(objective: Objective, update: Direction, fraction: float) -> None:
    """Shorten a step that was taken to a fraction."""
    for name, tensor in update.items():
        objective.parameters[name].sub_(tensor, alpha=1 - fraction)
        tensor.mul_(fraction)
