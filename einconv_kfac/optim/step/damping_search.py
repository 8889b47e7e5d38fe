"""Which damping of the inverses to try beside the present one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.step.subspace import Fit

SCALE_CHANGE = 3.0
"""Factor by which a trial changes that damping."""
SCALE_RANGE = (1e-3, 1e3)
"""Bounds on it, as a multiple of the damping of the quadratic model."""

Trial: TypeAlias = tuple[Fit, float, Inverses]
"""A step, the scale of its inverses' damping, and the inverses."""


class Trials:
    """Larger scales of the inverses' damping as long as that helps, or else smaller ones.

    Args:
        start: The present scale.
    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._known: list[Trial] = []

    def add_(self, trial: Trial) -> None:
        """Note what came of a scale."""
        self._known.append(trial)

    def best(self) -> Trial:
        """Return what promises the largest reduction."""
        return min(self._known, key=lambda trial: trial[0].rank)

    def scales(self) -> Iterator[float]:
        """Yield the scales, each to be tried before the next is asked for."""
        yield self._start
        for factor in (SCALE_CHANGE, 1 / SCALE_CHANGE):
            for scale in _powers(self._start, factor):
                yield scale
                if self.best()[1] != scale:
                    break
            if self.best()[1] != self._start:
                return


def _powers(start: float, factor: float) -> Iterator[float]:
    """Yield ``start`` times powers of a factor, from the first on, within `SCALE_RANGE`."""
    smallest, largest = SCALE_RANGE
    while smallest <= (start := start * factor) <= largest:
        yield start
