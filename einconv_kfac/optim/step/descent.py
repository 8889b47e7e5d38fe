"""Directions of descent, in the proportions of the learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, scaled


def descent(objective: Objective, ascent: Direction) -> Direction:
    """Return the direction opposite to one; learning rates count relative to the largest one."""
    largest = max(objective.rates.values()) or 1.0
    return scaled(ascent, {name: -rate / largest for name, rate in objective.rates.items()})


def descents(
    objective: Objective, ascents: Sequence[Direction]
) -> tuple[Sequence[Direction], float]:
    """Return directions and a factor of all that makes them the opposite ones, see `descent`."""
    rates = {*objective.rates.values()}
    if len(rates) == 1 and all(rates):
        return ascents, -1.0
    return [descent(objective, ascent) for ascent in ascents], 1.0
