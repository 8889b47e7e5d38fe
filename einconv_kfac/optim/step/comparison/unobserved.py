"""Terms of the gradient that the recorded losses do not explain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.replay.unknown_operations import OTHER_LOSS
from einconv_kfac.optim.step.fits.fit import Fit
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import sum_of

UNOBSERVED_FRACTION = 0.05
"""Fraction of the slope up to which a difference to the recorded losses counts as rounding."""
LARGEST_FRACTION = 0.5
"""The same, up to which a number that the model returned passes for the loss."""
ROUNDING = 1e-5
"""Slope, relative to the size of the losses, up to which it is attributed to rounding."""
PRECISE_EPSILON = 1e-4
"""Machine epsilon up to which slopes are compared."""


class UnobservedTerms:
    """Accounts to first order for terms that the recorded losses do not explain.

    Such are penalties that are added by hand to the loss that ``loss_fn`` computes, and changes
    of the gradient other than scaling. The first of them is reported by a warning.

    Args:
        replay: Runs the model again, to exclude that it does not repeat its outputs. Products
            with kept outputs of layers do not show it.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._warned = False

    def change(self, fit: Fit, rate: float, objective: Objective) -> float:
        """Return the change of the objective by these terms, for a step.

        Args:
            fit: The step.
            rate: The learning rate.
            objective: The objective.

        Raises:
            RuntimeError: If the model does not repeat its outputs, or if numbers that it returned
                passed for losses and are not.
        """
        slope = fit.along.first_slope
        if not (fit.unobserved and slope):
            return 0.0
        fraction = abs(fit.unobserved[0] / slope)
        if fraction <= UNOBSERVED_FRACTION:
            return 0.0
        sizes = [_size(batch) for batch in objective.batches]
        own = [sum_of(sizes), float(_is_precise(objective.batches))]
        size, precise = objective.workers.means(own, "size of the losses")
        if precise < 1 or not abs(slope) > ROUNDING * float(size):
            return 0.0
        self._replay.check_outputs(objective.batches)
        if fraction > LARGEST_FRACTION and all(own.is_assumed for own in objective.batches):
            raise RuntimeError(OTHER_LOSS.format(fraction=fraction))
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
        return rate * sum(c * slope for c, slope in zip(fit.coefficients, fit.unobserved))


def _size(batch: Batch) -> Tensor:
    """Return the size of a loss: its absolute value, and those of its terms to first order.

    The loss itself vanishes where its terms cancel, as those of Poisson's do, or by a constant.
    """
    size = batch.loss.abs().double()
    slopes = () if batch.loss_model is None else batch.loss_model.slopes()
    for slope, output in zip(slopes, batch.outputs):
        if slope is not None:
            terms = (slope * output).abs().double()
            size = size + terms.where(terms.isfinite(), 0).sum()
    return batch.weight.abs().double() * size


def _is_precise(batches: Sequence[Batch]) -> bool:
    """Return whether the slopes of the recorded losses are more than rounding."""
    return all(
        each.call.environment.precision(output.dtype) <= PRECISE_EPSILON
        for batch in batches
        for each, output in zip(batch.forwards, batch.outputs)
    )
