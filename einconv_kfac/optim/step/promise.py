"""A bound on the reduction that a step promises, by the objective itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.fits.fit import Fit
from einconv_kfac.optim.step.rollback import Rollback

FIRST_STEP = 10
"""Number of steps from which on objectives that have not been negative count as never negative."""


@dataclass(frozen=True)
class Promise:
    """Shortens steps that promise to reduce the objective by more than there is of it.

    Cross entropies and squared errors are never negative, and cannot fall by more than they are.
    The Gauss-Newton matrix of a saturated softmax nearly vanishes, also where its class is wrong.
    A model then promises many times the objective, and its step is as many times too long. In a
    large batch other examples supply curvature; in one of two to four none may. The step along
    which the linear model promises the objective is Polyak's (1987).

    Where batches agree, nothing is shortened: the objective may approach zero on its way to
    negative values, and the steps with it, and a step too long shows in the next objective.

    Args:
        rollback: The objectives so far.
        agreement: Whether batches agree.
    """

    rollback: Rollback
    agreement: Agreement

    def kept(self, fit: Fit, step: int) -> Fit:
        """Return a step, or the fraction of it that promises the objective.

        Args:
            fit: The step.
            step: The number of steps taken before.
        """
        lowest, largest = self.rollback.lowest, self.rollback.value
        if step < FIRST_STEP or lowest < 0 or self.agreement.is_close:
            return fit
        slope, bend = -fit.along.slope, fit.along.bend
        if not slope - bend / 2 > largest:
            return fit
        root = math.sqrt(max(slope**2 - 2 * bend * largest, 0.0))
        return fit.scaled(2 * largest / (slope + root))  # promises slope c - bend c^2 / 2
