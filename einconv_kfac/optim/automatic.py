"""The automatic step: step size, momentum and damping from the exact quadratic model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from einconv_kfac.optim.objective import Memory, Objective, Statistics
from einconv_kfac.optim.preconditioner import KFACPreconditioner
from einconv_kfac.optim.quadratic import Direction, QuadraticModel
from einconv_kfac.optim.renewal import Inverses
from einconv_kfac.optim.settings import Constants, is_due

_BUFFER = "momentum_buffer"

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


REJECTION = 4.0
"""Factor by which the damping and its floor grow when a step is undone."""
MIX_PERIOD = 5
"""Steps between two fits of a coefficient for every direction. In between, their combination
with the last coefficients is rescaled, which takes one Jacobian-vector product."""
LARGEST_CHANGE = 1.0
"""Bound on the change of a layer's output, root mean square, as a multiple of that of the
output itself, where a step follows trials. A larger one can leave rectifiers without a gradient
for good."""

SCALE_PERIOD = 100
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
        directions: The directions.
        model: The quadratic model in their span.
        coefficients: The coefficients that minimise it.
        predicted: The change that it predicts for them.
        mix: The coefficients of the preconditioned gradient, of what has no factors if there
            is such, and of the previous update if there is one.
    """

    directions: list[Direction]
    model: QuadraticModel
    coefficients: Tensor
    predicted: float
    mix: tuple[float, ...]

    def update(self, objective: Objective, rate: float = 1.0) -> Direction:
        """Return the step times a rate, by parameter name."""
        coefficients = (self.coefficients * rate).tolist()
        return {name: _combined(name, coefficients, self.directions) for name in objective.parameters}

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
        self._recorder.keeps_outputs = True
        self._damping: float | None = None
        self._floor = 0.0
        self._adapted: int | None = None
        self._scaled: int | None = None
        self._scale = 1.0
        self._mix: tuple[float, ...] = ()
        self._mixed: int | None = None
        self._range: tuple[float, float] | None = None
        self.ratio = math.nan
        self.moved: dict[str, tuple[Tensor, float]] = {}

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> Statistics:
        """Take a step, and return its statistics.

        Raises:
            RuntimeError: If a forward pass of the objective is not known.
        """
        objective.check_replay(self._recorder)
        self.moved = {}
        if self._undone_(objective, memory):
            return {"damping": self.damping(objective), "rejected": 1.0}
        damping = constants.damping
        damping = self.damping(objective) if damping is None else damping
        self._preconditioner.update_(constants)
        previous = {n: m[_BUFFER] for n, m in memory.items() if _BUFFER in m}
        fit = self.best_fit_(objective, previous, damping, constants.momentum)
        if not math.isfinite(fit.predicted):
            message = "The quadratic model was not finite; the step was skipped."
            warnings.warn(message, RuntimeWarning, stacklevel=6)
            if previous:  # skipping alone could meet the same model for ever
                self._undo_(objective, memory)
                return {"damping": damping, "rejected": 1.0}
            self.grow_()
            return {"damping": damping}
        rate = max(objective.rates.values())
        before = objective.value()
        for name, update in fit.update(objective, rate).items():
            memory[name][_BUFFER] = update
            self.moved[name] = update, 1.0
            objective.parameters[name].add_(update)
        predicted = fit.model.change(fit.coefficients * rate, damping)
        self.adapt_(self._preconditioner.steps, objective, before, predicted)
        return {
            "damping": damping,
            "step_size": fit.mix[0] * rate,
            "momentum": fit.mix[-1] * rate if previous else 0.0,
            "predicted": float(predicted),
            "ratio": self.ratio,
        }

    def _undone_(self, objective: Objective, memory: Memory) -> bool:
        """Undo the previous step if the objective on the present batch exploded.

        That is: if it exceeds all values so far by more than their largest size or range. On
        the batch of the previous step itself, a step that fits noise looks as good as any.
        """
        value = float(objective.value())
        lowest, highest = self._range or (value, value)
        exploded = value > highest + max(abs(highest), highest - lowest)
        if self._damping is None or not exploded or not any(_BUFFER in m for m in memory.values()):
            self._range = min(lowest, value), max(highest, value)
            return False
        self._undo_(objective, memory)
        return True

    def _undo_(self, objective: Objective, memory: Memory) -> None:
        """Undo the previous step, and raise the damping where it is automatic."""
        for name, parameter in objective.parameters.items():
            if _BUFFER in memory[name]:
                parameter.sub_(memory[name].pop(_BUFFER))
        if self._damping is not None:
            self._damping *= REJECTION
            self._floor *= REJECTION

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
        machine, given = self._preconditioner, self._damping is None
        if given or not is_due(machine.steps, self._scaled, SCALE_PERIOD, SCALE_GROWTH):
            machine.refresh_(damping * self._scale, objective.decay)
            directions = _directions(objective, machine.precondition(objective.gradient), previous)
            if momentum is None and self._keeps_mix(len(directions)):
                fit = self._rescaled(objective, directions, damping)
                if float(fit.coefficients) > 0 and not (previous and fit.mix[-1] > LARGEST_MOMENTUM):
                    return fit
            fit = self._fit(objective, directions, bool(previous), damping, momentum)
        else:
            tried: list[tuple[Fit, float, Inverses]] = []
            scales = self._scales()
            found = machine.inverted([damping * scale for scale in scales], objective.decay)
            for scale, inverses in zip(scales, found):
                covered = machine.precondition(objective.gradient, inverses)
                directions = _directions(objective, covered, previous)
                fit = self._fit(objective, directions, bool(previous), damping, momentum)
                tried.append((fit, scale, inverses))
            fit, self._scale, inverses = min(tried, key=lambda trial: trial[0].rank)
            self._scaled = machine.steps
            machine.use_(inverses)
            fit = self._bounded(objective, fit, damping)
        self._mix, self._mixed = fit.mix, machine.steps
        return fit

    def _scales(self) -> list[float]:
        """Return the present scale of the inverses' damping, a larger and a smaller one."""
        smallest, largest = SCALE_RANGE
        others = (self._scale * SCALE_CHANGE, self._scale / SCALE_CHANGE)
        return [self._scale, *(scale for scale in others if smallest <= scale <= largest)]

    def _keeps_mix(self, count: int) -> bool:
        """Tell whether the last coefficients still tell how to combine ``count`` directions."""
        due = is_due(self._preconditioner.steps, self._mixed, MIX_PERIOD)
        return not due and len(self._mix) == count

    def _rescaled(self, objective: Objective, directions: list[Direction], damping: float) -> Fit:
        """Return the best multiple of the combination with the last coefficients."""
        mixed = {name: _combined(name, self._mix, directions) for name in objective.parameters}
        model = objective.model(self._recorder, [mixed])
        scale = model.minimum(damping)
        predicted = float(model.change(scale, damping))
        mix = tuple(float(scale) * c for c in self._mix)
        return Fit([mixed], model, scale, predicted, mix)

    def _fit(
        self,
        objective: Objective,
        directions: list[Direction],
        has_previous: bool,
        damping: float,
        momentum: float | None,
    ) -> Fit:
        """Return the combination of directions that minimises the quadratic model."""
        model = objective.model(self._recorder, directions)
        coefficients = model.minimum(damping)
        if has_previous:
            best = float(coefficients[-1])
            wanted = min(max(best, 0.0), LARGEST_MOMENTUM) if momentum is None else momentum
            if wanted != best:
                coefficients = model.minimum(damping, {len(directions) - 1: wanted})
        predicted = float(model.change(coefficients, damping))
        return Fit(directions, model, coefficients, predicted, tuple(coefficients.tolist()))

    def _bounded(self, objective: Objective, fit: Fit, damping: float) -> Fit:
        """Return a step that changes no layer's output too much."""
        if not math.isfinite(fit.predicted):
            return fit
        update = fit.update(objective)
        change = self._preconditioner.largest_change(update, objective.parameters)
        scale = min(1.0, LARGEST_CHANGE / change) if change else 1.0
        if scale == 1.0:
            return fit
        coefficients = fit.coefficients * scale
        predicted = float(fit.model.change(coefficients, damping))
        mix = tuple(scale * c for c in fit.mix)
        return replace(fit, coefficients=coefficients, predicted=predicted, mix=mix)

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
            "mix": list(self._mix),
            "mixed": self._mixed,
            "range": self._range and list(self._range),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._damping = state["damping"]
        self._floor = state["floor"]
        self._adapted = state["adapted"]
        self._scale = state["scale"]
        self._scaled = state["scaled"]
        self._mix = tuple(state["mix"])
        self._mixed = state["mixed"]
        self._range = state["range"] and (state["range"][0], state["range"][1])


def _directions(objective: Objective, covered: Direction, previous: Direction) -> list[Direction]:
    """Return the descent directions, and the previous update unless it is empty.

    Learning rates count relative to the largest one.
    """
    rates, largest = objective.rates, max(objective.rates.values()) or 1.0
    descent = [
        {name: tensor * (-rates[name] / largest) for name, tensor in direction.items()}
        for direction in (covered, objective.others)
        if direction
    ]
    return [*descent, previous] if previous else descent


def _combined(name: str, coefficients: Sequence[float], directions: Sequence[Direction]) -> Tensor:
    """Return a combination of directions for one parameter."""
    (factor, first), *others = [(c, d[name]) for c, d in zip(coefficients, directions) if name in d]
    total = first * factor
    for factor, tensor in others:
        total.add_(tensor, alpha=factor)
    return total
