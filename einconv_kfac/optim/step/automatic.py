"""The automatic step: step size and damping from the exact quadratic model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import tee
from typing import Any

from torch import Tensor

from einconv_kfac.optim.hyperparameters import Constants, is_due
from einconv_kfac.optim.preconditioner import KFACPreconditioner
from einconv_kfac.optim.step.backtracking import shorten_
from einconv_kfac.optim.step.damping_search import Trial, Trials
from einconv_kfac.optim.step.objective import Memory, Objective, Statistics
from einconv_kfac.optim.step.slope_trust import Signal
from einconv_kfac.optim.step.slow_momentum import SlowMomentum
from einconv_kfac.optim.step.subspace import Fit, Fitting, descents
from einconv_kfac.optim.vectors import Direction

_BUFFER = "momentum_buffer"

INITIAL_DAMPING = 0.1
"""First damping, as a multiple of the curvature along the first gradient."""
SMALLEST_DAMPING = 1e-1
"""Smallest damping, as a multiple of the first: on the batch it was fitted to, even a step
that follows noise reduces the loss as predicted."""
ADAPTATION_PERIOD = 5
"""Steps between two adaptations of the damping."""
ADAPTATION = (19 / 20) ** ADAPTATION_PERIOD
"""Factor of one adaptation (Martens and Grosse, 2015)."""
REJECTION = 4.0
"""Factor by which the damping and its floor grow when a step is undone."""
ROUNDING = 1e-4
"""Growth of the objective, relative to its size, that does not count as such."""
SHORTENING_DAMPS = 2.0
"""Factor by which the damping and its floor grow when a step is shortened."""
MIX_PERIOD = 5
"""Steps between two fits of a coefficient for every direction. In between, their combination
with the last coefficients is rescaled, which takes one Jacobian-vector product."""
SCALE_PERIOD = 100
"""Steps between two trials of the damping of the inverses."""
SCALE_GROWTH = 2
"""Early trials come each time the number of steps has doubled or so."""


class AutomaticStep:
    """Levenberg-Marquardt damping, and the best combination of directions.

    Args:
        preconditioner: Preconditions gradients, and recorded the batches.
        safeguard: Whether to evaluate the objective again after every step.
    """

    def __init__(self, preconditioner: KFACPreconditioner, safeguard: bool = False) -> None:
        self._check_every_step = safeguard
        self._preconditioner = preconditioner
        self._replay = preconditioner.replay
        preconditioner.recorder.keeps_outputs = True
        self._signal = Signal()
        self._slow = SlowMomentum()
        self._fitting = Fitting(preconditioner, self._signal)
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

    @property
    def gains(self) -> dict[str, float]:
        """How far the slow momentum lets steps be followed, by module."""
        return self._slow.gains.by_layer

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> Statistics:
        """Take a step, and return its statistics.

        Raises:
            RuntimeError: If a forward pass of the objective is not known.
        """
        objective.check_replay(self._replay)
        self.moved = {}
        if self._undone_(objective, memory):
            return {"damping": self.damping(objective), "rejected": 1.0}
        self._signal.learn_(objective.gradient)
        damping = constants.damping
        damping = self.damping(objective) if damping is None else damping
        self._preconditioner.update_(constants)
        previous = {n: m[_BUFFER] for n, m in memory.items() if _BUFFER in m}
        slow = constants.momentum is None
        momentum = self._slow.direction(memory, objective.rates) if slow else previous
        fit = self.best_fit_(objective, momentum, damping, constants.momentum)
        if not math.isfinite(fit.expected):
            message = "The quadratic model was not finite; the step was skipped."
            warnings.warn(message, RuntimeWarning, stacklevel=6)
            if previous:  # skipping alone could meet the same model for ever
                self._undo_(objective, memory)
                return {"damping": damping, "rejected": 1.0}
            self.grow_()
            return {"damping": damping}
        rate = max(objective.rates.values())
        before = objective.value()
        update = fit.update(objective, rate)
        for name, tensor in update.items():
            objective.parameters[name].add_(tensor)
        predicted = fit.predicted(damping, rate)
        rate *= self.adapt_(objective, update, before, predicted)
        coefficient = fit.mix[-1] * rate
        if slow:
            coefficient = self._follow_(objective, update, memory, before)
        coefficient = coefficient if momentum else 0.0
        for name, tensor in update.items():
            memory[name][_BUFFER] = tensor
            self.moved[name] = tensor, 1.0
        if len(fit.directions) == len(fit.mix):
            moved = fit.moved(rate, coefficient if slow else 0.0)
            self._signal.expect_(fit.directions[0], float(fit.model.slope[0]), moved)
        return {
            "damping": damping,
            "step_size": fit.mix[0] * rate,
            "momentum": coefficient,
            "signal": self._signal.fraction,
            "gain": self._slow.gains.mean,
            "predicted": predicted,
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
        self._slow.drop_(memory)
        for name, parameter in objective.parameters.items():
            if _BUFFER in memory[name]:
                parameter.sub_(memory[name].pop(_BUFFER))
        self._signal.forget_()
        if self._damping is not None:
            self._damping *= REJECTION
            self._floor *= REJECTION

    def damping(self, objective: Objective) -> float:
        """Return the damping; the first is a fraction of the curvature along the gradient."""
        if self._damping is None:
            model = objective.model(self._replay, [objective.gradient])
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
        momentum: Direction,
        damping: float,
        coefficient: float | None,
    ) -> Fit:
        """Return the best step, with up-to-date inverses.

        From time to time larger and smaller dampings of the inverses are tried beside the
        present one, and what promises the largest reduction is kept (as Martens and Grosse,
        2015, do). A damping that is given is used as given.

        Args:
            objective: The objective.
            momentum: What the last steps amount to, empty at first.
            damping: The damping of the quadratic model.
            coefficient: How much of it is part of the step, if that is given; otherwise it is
                no part of the step, but of the quadratic model.
        """
        machine, given = self._preconditioner, self._damping is None
        follows = bool(momentum), coefficient or 0.0
        if given or not is_due(machine.steps, self._scaled, SCALE_PERIOD, SCALE_GROWTH):
            machine.refresh_(damping * self._scale, objective.decay)
            covered = machine.precondition(objective.gradient)
            directions = descents(objective, covered)
            if coefficient is None and self._keeps_mix(len(directions)):
                fit = self._fitting.rescaled(
                    objective, directions, damping, self._mix, bounded=not given
                )
                if float(fit.coefficients) > 0:
                    return fit
            directions += [momentum] if momentum else []
            fit = self._fitting.full(objective, directions, damping, follows, bounded=not given)
        else:
            fit, self._scale, inverses = self._best_trial(objective, momentum, damping, follows)
            self._scaled = machine.steps
            machine.use_(inverses)
        self._mix, self._mixed = fit.mix[: len(fit.mix) - bool(momentum)], machine.steps
        return fit

    def _best_trial(
        self,
        objective: Objective,
        momentum: Direction,
        damping: float,
        follows: tuple[bool, float],
    ) -> Trial:
        """Return the best step with its scale of the inverses' damping, and the inverses."""
        machine = self._preconditioner
        trials = Trials(self._scale)
        wanted, tried = tee(trials.scales())
        found = machine.inverted((damping * scale for scale in wanted), objective.decay)
        for inverses in found:
            covered = machine.precondition(objective.gradient, inverses)
            directions = [*descents(objective, covered), *([momentum] if momentum else [])]
            fit = self._fitting.full(objective, directions, damping, follows, bounded=True)
            trials.add_((fit, next(tried), inverses))
        return trials.best()

    def _keeps_mix(self, count: int) -> bool:
        """Tell whether the last coefficients still tell how to combine ``count`` directions."""
        due = is_due(self._preconditioner.steps, self._mixed, MIX_PERIOD)
        return not due and len(self._mix) == count

    def _follow_(
        self, objective: Objective, update: Direction, memory: Memory, before: Tensor
    ) -> float:
        """Follow the slow momentum, and return its coefficient.

        Where every step is checked, the momentum is dropped if with it the objective has grown
        on its own batch.

        Args:
            objective: The objective; the step on the batch was taken.
            update: That step; what is followed is added to it.
            memory: Where the momentum is kept.
            before: The objective before the step.
        """
        checks = self._check_every_step
        own = {name: tensor.clone() for name, tensor in update.items() if checks}
        coefficient = self._slow.follow_(objective, update, memory, self._signal.fraction)
        allowed = before + ROUNDING * before.abs()
        if not checks or bool(objective.value_again(self._replay) <= allowed):
            return coefficient
        for name, tensor in own.items():
            objective.parameters[name].add_(tensor - update[name])
            update[name].copy_(tensor)
        self._slow.drop_(memory)
        return 0.0

    def adapt_(
        self, objective: Objective, update: Direction, before: Tensor, predicted: float
    ) -> float:
        """Compare the reduction of the objective with the predicted one, where it is due.

        Where the objective has grown instead, the step is shortened until it does not.

        Args:
            objective: The objective; its parameters are the new ones by now.
            update: The step that was just taken; it is shortened in place.
            before: The objective before the step.
            predicted: The change that the model predicted.

        Returns:
            The fraction of the step that is left.
        """
        step = self._preconditioner.steps
        due = is_due(step, self._adapted, ADAPTATION_PERIOD)
        if self._damping is None or not predicted or not (due or self._check_every_step):
            return 1.0
        change = float(objective.value_again(self._replay) - before)
        self.ratio = change / predicted
        if due:
            self._adapted = step
            self._follow_ratio_(predicted)
        allowed = before + ROUNDING * before.abs() + max(predicted, 0.0)
        if not float(before) + change <= float(allowed):  # also if it is not a number
            self._damping *= SHORTENING_DAMPS
            self._floor *= SHORTENING_DAMPS
            return shorten_(objective, self._replay, update, allowed)
        return 1.0

    def _follow_ratio_(self, predicted: float) -> None:
        """Shrink the damping where the model was right, and grow it where it was not.

        A growth may be predicted where ``lr`` or the momentum is given. It is no reason to
        shrink the damping, and a reason to grow it where the true one is larger.
        """
        assert self._damping is not None
        if predicted < 0 and self.ratio > 3 / 4:
            self._damping = max(self._damping * ADAPTATION, self._floor)
        elif not 1 / 4 <= self.ratio <= 1:  # also if it is not a number
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
            "reach": self._fitting.reach,
            "slow": self._slow.state_dict(),
            "signal": self._signal.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take over a state; tensors are copied to the device of the parameters."""
        self._damping = state["damping"]
        self._floor = state["floor"]
        self._adapted = state["adapted"]
        self._scale = state["scale"]
        self._scaled = state["scaled"]
        self._mix = tuple(state["mix"])
        self._mixed = state["mixed"]
        self._range = state["range"] and (state["range"][0], state["range"][1])
        self._fitting.reach = state["reach"]
        self._slow.load_state_dict(state["slow"])
        self._signal.load_state_dict(state["signal"], parameters)
