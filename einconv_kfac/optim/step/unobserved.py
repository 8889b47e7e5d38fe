"""Terms of the gradient that the recorded losses do not explain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.quadratic_model import QuadraticModel

UNOBSERVED_FRACTION = 0.05
"""Fraction of the slope up to which a difference to the recorded losses counts as rounding."""
ROUNDING = 1e-5
"""Slope, relative to the objective, up to which it is attributed to rounding."""
PRECISE_EPSILON = 1e-4
"""Machine epsilon up to which slopes are compared."""


class UnobservedTerms:
    """Accounts to first order for terms that the recorded losses do not explain.

    Such are penalties that are added by hand to the loss that ``loss_fn`` computes, and changes
    of the gradient other than scaling. The first of them is reported by a warning.
    """

    def __init__(self) -> None:
        self._warned = False

    def change(self, model: QuadraticModel, coefficients: Tensor, objective: Objective) -> float:
        """Return the change of the objective by these terms, for a step.

        Args:
            model: The quadratic model.
            coefficients: The coefficients of the step, ``[m]``.
            objective: The objective.
        """
        fraction = model.unobserved_fraction()
        if model.unobserved is None or fraction <= UNOBSERVED_FRACTION:
            return 0.0
        own = [_size(objective.batches), float(_is_precise(objective.batches))]
        size, precise = objective.workers.means(own, "size of the losses")
        if precise < 1:
            return 0.0
        if not float(model.slope[0].abs()) > ROUNDING * size:
            return 0.0
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{fraction:.0%} of the slope along the step are not explained by the recorded "
                "losses: the gradient has other terms, or was changed. They enter the step to "
                "first order. Write `loss = optimizer.observe(loss)` with the whole loss before "
                "`loss.backward()` to include their curvature.",
                RuntimeWarning,
                stacklevel=8,
            )
        return float(coefficients.dot(model.unobserved))


def _size(batches: Sequence[Batch]) -> float:
    """Return the sum of the sizes of losses."""
    return sum(float((batch.weight * batch.loss).abs()) for batch in batches)


def _is_precise(batches: Sequence[Batch]) -> bool:
    """Return whether the slopes of the recorded losses are more than rounding."""
    return all(
        each.call.environment.precision(output.dtype) <= PRECISE_EPSILON
        for batch in batches
        for each, output in zip(batch.forwards, batch.outputs)
    )
