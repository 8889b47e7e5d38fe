"""The best combination of a few directions, by the quadratic model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from einconv_kfac.optim.preconditioner import KFACPreconditioner
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.quadratic_model import QuadraticModel
from einconv_kfac.optim.step.slope_trust import Signal
from einconv_kfac.optim.vectors import Direction, combined

LARGEST_CHANGE = math.log(2)
"""Bound on the sum over layers of the relative changes of their outputs. Where each of many
layers in a row changes by ``c``, the network changes by up to ``prod(1 + c) - 1 <= 1`` (deep
relative trust; Bernstein et al., 2020), which no quadratic model knows. A larger change can
leave rectifiers without a gradient for good."""
CERTAIN = 0.5
"""Fraction of that bound up to which the change of a rescaled step is taken to be as large per
length as that of the last step for which it was computed; beyond it is computed."""


@dataclass(frozen=True)
class Fit:
    """A step: a combination of directions.

    Args:
        directions: The directions.
        model: The quadratic model of the batch in their span.
        coefficients: The coefficients.
        expected: The change of the objective to be expected of them, not only on the batch.
        mix: The coefficients of the preconditioned gradient, of what has no factors if there
            is such, and of a momentum if there is one.
    """

    directions: list[Direction]
    model: QuadraticModel
    coefficients: Tensor
    expected: float
    mix: tuple[float, ...]

    def update(self, objective: Objective, rate: float = 1.0) -> Direction:
        """Return the step times a rate, by parameter name."""
        coefficients = (self.coefficients * rate).tolist()
        return {
            name: combined(name, coefficients, self.directions) for name in objective.parameters
        }

    def predicted(self, damping: float, rate: float = 1.0) -> float:
        """Return the change of the damped objective on the batch that the model predicts."""
        return float(self.model.change(self.coefficients * rate, damping))

    @property
    def length(self) -> float:
        """Return the Euclidean norm of the step."""
        return math.sqrt(max(0.0, float(self.coefficients @ self.model.gram @ self.coefficients)))

    def scaled(self, factor: float, expected: float) -> Fit:
        """Return the step times a factor, and what is then expected."""
        mix = tuple(factor * c for c in self.mix)
        return replace(self, coefficients=self.coefficients * factor, expected=expected, mix=mix)

    def moved(self, rate: float, last: float = 0.0) -> float:
        """Return ``d.(G + W).u`` for the first direction ``d``.

        Args:
            rate: What the step is multiplied with in ``u``.
            last: What is added to it of the last direction.
        """
        curvature = self.model.curvature[0]
        return rate * float(curvature @ self.coefficients) + last * float(curvature[-1])

    @property
    def rank(self) -> float:
        """Return the expected change, or infinity if that is not a number."""
        return math.inf if math.isnan(self.expected) else self.expected


class Fitting:
    """Fits coefficients.

    Args:
        preconditioner: Recorded the batches, and knows the layers.
        signal: Tells how much of the slopes along descent directions to trust.

    Attributes:
        reach: Change of the layers' outputs per length of a step, when it was last computed.
    """

    def __init__(self, preconditioner: KFACPreconditioner, signal: Signal) -> None:
        self._preconditioner = preconditioner
        self._signal = signal
        self.reach = math.inf

    def full(
        self,
        objective: Objective,
        directions: list[Direction],
        damping: float,
        momentum: tuple[bool, float],
        *,
        bounded: bool,
    ) -> Fit:
        """Return the best combination.

        Args:
            objective: The objective.
            directions: The directions.
            damping: The damping of the quadratic model.
            momentum: Whether the last direction is a momentum, and its coefficient.
            bounded: Whether to keep the change of the layers' outputs within `LARGEST_CHANGE`.
        """
        has_momentum, coefficient = momentum
        model = objective.model(self._preconditioner.replay, directions)
        descents = len(directions) - has_momentum
        trusted = self._signal.corrected(model, descents)
        coefficients = trusted.minimum(damping, {descents: coefficient} if has_momentum else None)
        expected = float(trusted.change(coefficients, damping))
        fit = Fit(directions, model, coefficients, expected, tuple(coefficients.tolist()))
        return self._bounded(objective, fit, trusted, damping) if bounded else fit

    def _bounded(
        self, objective: Objective, fit: Fit, trusted: QuadraticModel, damping: float
    ) -> Fit:
        """Return a step, or the largest fraction that changes the layers' outputs little enough."""
        if not math.isfinite(fit.expected):
            return fit
        update = fit.update(objective)
        change = self._preconditioner.relative_change(update, objective.parameters)
        self.reach = change / length if (length := fit.length) else math.inf
        if change <= LARGEST_CHANGE:
            return fit
        scale = LARGEST_CHANGE / change
        return fit.scaled(scale, float(trusted.change(fit.coefficients * scale, damping)))

    def rescaled(
        self,
        objective: Objective,
        directions: list[Direction],
        damping: float,
        mix: tuple[float, ...],
        *,
        bounded: bool,
    ) -> Fit:
        """Return the best multiple of the combination with the last coefficients.

        Args:
            objective: The objective.
            directions: The directions.
            damping: The damping of the quadratic model.
            mix: The last coefficients.
            bounded: As for `full`; far from the bound, the change is not computed but taken to
                be proportional to the length of the step.
        """
        mixed = {name: combined(name, mix, directions) for name in objective.parameters}
        model = objective.model(self._preconditioner.replay, [mixed])
        trusted = self._signal.corrected(model, 1)
        scale = trusted.minimum(damping)
        expected = float(trusted.change(scale, damping))
        fit = Fit([mixed], model, scale, expected, tuple(float(scale) * c for c in mix))
        if not bounded or self.reach * fit.length <= CERTAIN * LARGEST_CHANGE:
            return fit
        return self._bounded(objective, fit, trusted, damping)


def descents(objective: Objective, covered: Direction) -> list[Direction]:
    """Return the descent directions; learning rates count relative to the largest one.

    Args:
        objective: The objective.
        covered: The preconditioned gradient of the parameters that have factors.
    """
    rates, largest = objective.rates, max(objective.rates.values()) or 1.0
    return [
        {name: tensor * (-rates[name] / largest) for name, tensor in direction.items()}
        for direction in (covered, objective.others)
        if direction
    ]
