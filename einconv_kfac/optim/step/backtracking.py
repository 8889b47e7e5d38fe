"""Backtracking: shortening a step after which the objective has grown on its own batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from einconv_kfac.optim.vectors import Direction

BACKTRACKING_FACTOR = 0.25
"""Factor by which a step is shortened in one attempt."""
BACKTRACKING_ATTEMPTS = 8
"""Maximum number of attempts; after the last one the step is taken back."""


def backtrack_(
    parameters: Direction, update: Direction, value: Callable[[], Tensor], allowed: Tensor
) -> float:
    """Shorten a step until the objective is small enough, or else take it back.

    Args:
        parameters: The parameters after the step, by name.
        update: The step; it is shortened in place.
        value: Evaluates the objective at the present parameters.
        allowed: The largest value that is accepted.

    Returns:
        The fraction of the step that is left.
    """
    fraction = 1.0
    for _ in range(BACKTRACKING_ATTEMPTS):
        _scale_(parameters, update, BACKTRACKING_FACTOR)
        fraction *= BACKTRACKING_FACTOR
        if bool(value() <= allowed):
            return fraction
    _scale_(parameters, update, 0.0)
    return 0.0


def _scale_(parameters: Direction, update: Direction, fraction: float) -> None:
    """Shorten a step that was taken to a fraction."""
    own = [parameters[name] for name in update]
    torch._foreach_sub_(own, [*update.values()], alpha=1 - fraction)
    torch._foreach_mul_([*update.values()], fraction)
