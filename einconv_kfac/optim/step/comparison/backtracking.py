"""Backtracking: shortening a step after which the objective has grown on its own batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from einconv_kfac.optim.step.in_place import add_, copy_
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.vectors import Direction

BACKTRACKING_FACTOR = 0.25
"""Factor by which a step is shortened in one attempt."""
BACKTRACKING_ATTEMPTS = 8
"""Maximum number of attempts; after the last one the step is taken back."""


def backtrack_(
    parameters: Direction, update: Direction, value: Callable[[], Tensor], allowed: Tensor
) -> float:
    """Shorten a step until the objective is small enough, or else take it back.

    On a GPU an attempt is made before the host has read whether the one before it was enough.

    Args:
        parameters: The parameters after the step, by name.
        update: The step; it is shortened in place.
        value: Evaluates the objective at the present parameters.
        allowed: The largest value that is accepted.

    Returns:
        The fraction of the step that is left.
    """
    own, steps = [parameters[name] for name in update], [*update.values()]
    fraction, asked = 1.0, None
    for share in (*[BACKTRACKING_FACTOR] * BACKTRACKING_ATTEMPTS, 0.0):
        kept = [tensor.clone() for tensor in (*own, *steps) if asked is not None]
        _scale_(own, steps, share)
        following = Unread(value() <= allowed) if share else None
        if asked is not None and asked.read()[0][0]:  # the attempt before was small enough
            copy_([*own, *steps], kept)
            return fraction
        fraction, asked = fraction * share, following
        if asked is not None and not asked.is_late:
            if asked.read()[0][0]:
                return fraction
            asked = None
    return fraction


def _scale_(parameters: list[Tensor], steps: list[Tensor], fraction: float) -> None:
    """Shorten a step that was taken to a fraction."""
    add_(parameters, steps, fraction - 1)
    torch._foreach_mul_(steps, fraction)
