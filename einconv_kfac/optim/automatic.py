"""The automatic step: step size, momentum and damping from the exact quadratic model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from einconv_kfac.optim.objective import Memory, Objective
from einconv_kfac.optim.preconditioner import Inverses, KFACPreconditioner
from einconv_kfac.optim.quadratic import Direction, QuadraticModel, sum_of
from einconv_kfac.optim.settings import Constants, is_due

INITIAL_DAMPING = 0.1
"""First damping, as a multiple of the curvature along the first gradient."""
SMALLEST_DAMPING = 1e-1
"""Smallest damping, as a multiple of the first: on the batch it was fitted to, even a step
that follows noise reduces the loss as predicted."""
LARGEST_MOMENTUM = 0.95
"""Bound on the coefficient of the previous update; the quadratic model of one small batch is
no guide to a larger one. The other bound is zero."""
ADAPTATION_PERIOD = 5
"""Steps between two adaptations of the damping."""
ADAPTATION = (19 / 20) ** ADAPTATION_PERIOD
"""Factor of one adaptation (Martens and Grosse, 2015)."""


_BUFFER = "momentum_buffer"

SCALE_PERIOD = 20
"""Steps between two trials of the damping of the inverses."""
SCALE_GROWTH = 2
"""Early trials come each time the number of steps has doubled or so."""
SCALE_CHANGE = 3.0
"""Factor by which a trial changes that damping."""
SCALE_RANGE = (1e-3, 1e3)
"""Bounds on it, as a multiple of the damping of the quadratic model."""


@dataclass(frozen=True)
class Fit:
    """A step: a combination of directions.

    Args:
        directions: The directions, the previous update last if there is one.
        model: The quadratic model in their span.
        coefficients: The coefficients that minimise it.
        predicted: The change that it predicts for them.
        has_previous: Whether the last direction is the previous update.
    """

    directions: list[Direction]
    model: QuadraticModel
    coefficients: Tensor
    predicted: float
    has_previous: bool

    @property
    def rank(self) -> float:
        """Return the predicted change, or infinity if that is not a number."""
        return math.inf if math.isnan(self.predicted) else self.predicted


class AutomaticStep:
    """Levenberg-Marquardt damping, and the best combination of directions.

    Args:
        preconditioner: Preconditions gradients, and recorded the batches.
    """

    def __init__(self, preconditioner: KFACPreconditioner) -> None:
        self._preconditioner = preconditioner
        self._recorder = preconditioner.recorder
        self._damping: float | None = None
        self._floor = 0.0
        self._adapted: int | None = None
        self._scaled: int | None = None
        self._scale = 1.0
        self.ratio = math.nan

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> dict[str, float]:
        """Take a step, and return its statistics.

        Raises:
            RuntimeError: If a forward pass of the objective is not known.
        """
        objective.check_replay()
        damping = constants.damping
        damping = self.damping(objective) if damping is None else damping
        self._preconditioner.update_(constants)
        previous = {n: m[_BUFFER] for n, m in memory.items() if _BUFFER in m}
        fit = self.best_fit_(objective, previous, damping, constants.momentum)
        if not math.isfinite(fit.predicted):
            self.grow_()
            message = "The quadratic model was not finite; the step was skipped."
            warnings.warn(message, RuntimeWarning, stacklevel=6)
            return {"damping": damping}
        rate = max(objective.rates.values())
        before = objective.value()
        _move_(objective, memory, fit.directions, fit.coefficients * rate)
        predicted = fit.model.change(fit.coefficients * rate, damping)
        self.adapt_(self._preconditioner.steps, objective, before, predicted)
        return {
            "damping": damping,
            "step_size": float(fit.coefficients[0]) * rate,
            "momentum": float(fit.coefficients[-1]) * rate if fit.has_previous else 0.0,
            "predicted": float(predicted),
            "ratio": self.ratio,
        }

    def damping(self, objective: Objective) -> float:
        """Return the damping; the first is a fraction of the curvature along the gradient."""
        if self._damping is None:
            model = objective.model(self._recorder, [objective.gradient])
            curvature = float(model.curvature / model.gram)
            if not 0 < curvature < math.inf:
                raise RuntimeError(
                    "The first `damping` follows from the curvature along the gradient, which "
                    f"must be positive, got {curvature}. Pass `damping`."
                )
            self._damping = INITIAL_DAMPING * curvature
            self._floor = SMALLEST_DAMPING * self._damping
        return self._damping

    def best_fit_(
        self,
        objective: Objective,
        previous: Direction,
        damping: float,
        momentum: float | None,
    ) -> Fit:
        """Return the best step, with up-to-date inverses.

        From time to time a larger and a smaller damping of the inverses are tried beside the
        present one, and what promises the largest reduction is kept (as Martens and Grosse,
        2015, do). A damping that is given is used as given.

        Args:
            objective: The objective.
            previous: The previous update, empty if there is none.
            damping: The damping of the quadratic model.
            momentum: The coefficient of the previous update if it is given.
        """
        machine = self._preconditioner
        given = self._damping is None
        if given or not is_due(machine.steps, self._scaled, SCALE_PERIOD, SCALE_GROWTH):
            machine.refresh_(damping * self._scale, objective.decay)
            covered = machine.precondition(objective.gradient)
            return self._fit(objective, (covered, previous), damping, momentum)
        tried: list[tuple[Fit, float, Inverses]] = []
        for scale in self._scales():
            inverses = machine.inverted(damping * scale, objective.decay)
            covered = machine.precondition(objective.gradient, inverses)
            fit = self._fit(objective, (covered, previous), damping, momentum)
            tried.append((fit, scale, inverses))
        best, self._scale, inverses = min(tried, key=lambda trial: trial[0].rank)
        self._scaled = machine.steps
        machine.use_(inverses)
        return best

    def _scales(self) -> list[float]:
        """Return the present scale of the inverses' damping, a larger and a smaller one."""
        smallest, largest = SCALE_RANGE
        others = (self._scale * SCALE_CHANGE, self._scale / SCALE_CHANGE)
        return [self._scale, *(scale for scale in others if smallest <= scale <= largest)]

    def _fit(
        self,
        objective: Objective,
        directions: tuple[Direction, Direction],
        damping: float,
        momentum: float | None,
    ) -> Fit:
        """Return the combination of directions that minimises the quadratic model."""
        covered, previous = directions
        descent = _descent(objective, covered)
        every = [*descent, previous] if previous else descent
        model = objective.model(self._recorder, every)
        coefficients = model.minimum(damping)
        if previous:
            best = float(coefficients[-1])
            wanted = min(max(best, 0.0), LARGEST_MOMENTUM) if momentum is None else momentum
            if wanted != best:
                coefficients = model.minimum(damping, {len(descent): wanted})
        predicted = float(model.change(coefficients, damping))
        return Fit(every, model, coefficients, predicted, bool(previous))

    def adapt_(self, step: int, objective: Objective, before: Tensor, predicted: Tensor) -> None:
        """Compare the reduction of the objective with the predicted one, where it is due.

        Args:
            step: The number of the step that was just taken.
            objective: The objective; its parameters are the new ones by now.
            before: The objective before the step.
            predicted: The change that the model predicted.
        """
        if self._damping is None or not is_due(step, self._adapted, ADAPTATION_PERIOD):
            return
        if not predicted:
            return
        self._adapted = step
        self.ratio = float((objective.value_again(self._recorder) - before) / predicted)
        if self.ratio > 3 / 4:
            self._damping = max(self._damping * ADAPTATION, self._floor)
        elif not self.ratio >= 1 / 4:  # also if it is not a number
            self.grow_()

    def grow_(self) -> None:
        """Grow an automatic damping by one adaptation."""
        if self._damping is not None:
            self._damping /= ADAPTATION

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        return {
            "damping": self._damping,
            "floor": self._floor,
            "adapted": self._adapted,
            "scale": self._scale,
            "scaled": self._scaled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._damping = state["damping"]
        self._floor = state["floor"]
        self._adapted = state["adapted"]
        self._scale = state["scale"]
        self._scaled = state["scaled"]


def _descent(objective: Objective, covered: Direction) -> list[Direction]:
    """Return descent directions: of the covered parameters, and of the others.

    Learning rates count relative to the largest one.
    """
    rates, largest = objective.rates, max(objective.rates.values()) or 1.0
    return [
        {name: tensor * (-rates[name] / largest) for name, tensor in direction.items()}
        for direction in (covered, objective.others)
        if direction
    ]


def _move_(objective: Objective, memory: Memory, directions: list[Direction], coefficients: Tensor) -> None:
    """Add the combination of directions to the parameters, and remember it."""
    for name, parameter in objective.parameters.items():
        scales = coefficients.to(parameter)
        update = sum_of([c * d[name] for c, d in zip(scales, directions) if name in d])
        memory[name][_BUFFER] = update
        parameter.add_(update)
