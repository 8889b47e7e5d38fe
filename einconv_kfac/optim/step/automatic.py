"""The automatic step: step size, momentum and damping from the exact quadratic model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.step.automatic_state import check_automatic_state
from einconv_kfac.optim.step.damping.first_curvature import first_curvature
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.damping.search import DampingSearch
from einconv_kfac.optim.step.layer_gains import mean_gain
from einconv_kfac.optim.step.objective import Objective, common_momentum
from einconv_kfac.optim.step.reduction import Before, Reduction
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER, Rollback, last_update, undo_
from einconv_kfac.optim.step.slope_trust import SlopeTrust
from einconv_kfac.optim.step.slow_momentum import SlowMomentum
from einconv_kfac.optim.step.step_protocol import Statistics, Taken
from einconv_kfac.optim.step.subspace import Fit, Momentum, SubspaceFit, descent_directions
from einconv_kfac.optim.step.unobserved import UnobservedTerms
from einconv_kfac.optim.vectors import Direction

UNDONE_FACTOR = 4.0
"""Factor by which the damping and its floor grow when a step is undone."""


class AutomaticStep:
    """The minimum of the quadratic model in a subspace, with adaptive damping.

    Args:
        curvature: Running curvature of the model, which replays the batches.
        rule: The damping rule.
        safeguard: Whether to evaluate the objective again after every step.
    """

    mode = "automatic"
    moves_parameters = True

    def __init__(self, curvature: RunningCurvature, rule: DampingRule, safeguard: bool) -> None:
        self._curvature = curvature
        self._replay = curvature.replay
        curvature.recorder.keeps_outputs = True
        self._rule = rule
        self._safeguard = safeguard
        self._trust = SlopeTrust()
        self._slow = SlowMomentum()
        self._subspace = SubspaceFit(curvature, self._trust)
        self._search = DampingSearch()
        self._rollback = Rollback()
        self._reduction = Reduction(self._replay, rule, safeguard)
        self._unobserved = UnobservedTerms()

    def check(self, objective: Objective) -> None:
        """See `Step`."""
        if not objective.parameters:
            return
        if not objective.batches:
            raise RuntimeError(
                "`step` needs the loss it steps on, but saw none whose gradient is in `.grad`. "
                "Compute it as `loss_fn(model(x), y)` with the module given to KFAC, or write "
                "`loss = optimizer.observe(loss)` before `loss.backward()`."
            )

    def take_(self, objective: Objective) -> Taken:
        """See `Step`."""
        at = objective.batches, objective.parameters, objective.gradient
        objective = replace(objective, batches=self._replay.check(*at))
        momentum = common_momentum(objective)
        if self._undone_(objective):
            return Taken({"damping": self._damping(objective) or math.nan, "rejected": 1.0})
        self._trust.sample_(objective.gradient)
        damping = self._damping(objective)
        self._curvature.update_()
        if damping is None:
            return Taken({})
        previous = last_update(objective.memory)
        is_slow = momentum is None
        followed = Momentum(
            self._slow.direction(objective.memory, objective.rates) if is_slow else previous,
            momentum,
        )
        fit = self._best_fit_(objective, followed, damping)
        if not math.isfinite(fit.expected):
            return self._skipped_(objective, damping, bool(previous))
        rate = max(objective.rates.values())
        update = fit.update(objective, rate)
        others = self._unobserved.change(fit.model, fit.coefficients * rate, objective)
        before = self._reduction.before(objective, self._curvature.steps, others)
        for name, tensor in update.items():
            objective.parameters[name].add_(tensor)
        predicted = fit.predicted(damping, rate)
        rate *= self._reduction.adapt_(objective, update, before, predicted, self._curvature.steps)
        coefficient = fit.mix[-1] * rate
        if is_slow:
            coefficient = self._add_momentum_(objective, update, before)
        coefficient = coefficient if followed.direction else 0.0
        for name, tensor in update.items():
            objective.memory[name][MOMENTUM_BUFFER] = tensor
        if fit.is_full:
            moved = fit.moved(rate, coefficient if is_slow else 0.0)
            self._trust.predict_(fit.directions[0], float(fit.model.slope[0]), moved)
        numbers = {"damping": damping, "step_size": fit.mix[0] * rate, "momentum": coefficient}
        return self._taken(update, {**numbers, "predicted": predicted})

    def _taken(self, update: Direction, numbers: Statistics) -> Taken:
        """Return a step with its statistics."""
        gains = self._slow.gains.by_layer
        numbers = {
            **numbers,
            "trust": self._trust.fraction,
            "gain": mean_gain(gains),
            "ratio": self._reduction.ratio,
        }
        return Taken(numbers, {name: (tensor, 1.0) for name, tensor in update.items()}, gains)

    def _damping(self, objective: Objective) -> float | None:
        """Return the damping: the given one, or that of the rule.

        There is none as long as every gradient was zero.
        """
        if (given := objective.settings.damping) is not None:
            return cast("float", given)
        step = self._curvature.steps
        damping = self._rule.damping(step)
        if damping is None:
            curvature = first_curvature(self._replay, objective)
            if curvature is None:
                return None
            self._rule.initial(curvature)
            damping = self._rule.damping(step)
            assert damping is not None
        return damping

    def _best_fit_(self, objective: Objective, momentum: Momentum, damping: float) -> Fit:
        """Return the best step, with up-to-date inverses.

        From time to time larger and smaller dampings of the inverses are tried as well, and
        the one that promises the largest reduction is kept. A given damping is used as given.
        """
        curvature, search = self._curvature, self._search
        given = objective.settings.damping is not None
        if given or not search.is_due(curvature.steps):
            curvature.refresh_(damping * search.scale, objective.decay)
            covered = curvature.precondition(objective.gradient)
            return self._subspace.best_(objective, covered, momentum, damping)

        def fit(inverses: Inverses) -> Fit:
            covered = curvature.precondition(objective.gradient, inverses)
            directions = descent_directions(objective, covered)
            return self._subspace.full(objective, directions, momentum, damping)

        invert = curvature.trial_inverses(objective.decay)
        best = search.best_(curvature.steps, lambda scale: invert(damping * scale), fit)
        curvature.use_(best.inverses)
        return self._subspace.keep_(best.fit, momentum)

    def _undone_(self, objective: Objective) -> bool:
        """Undo the last step if the objective exploded, and return whether it did."""
        value = float(objective.value())
        steps = self._curvature.steps
        can_undo = self._rule.damping(steps) is not None and last_update(objective.memory)
        if not (can_undo and self._rollback.is_needed(value)):
            self._rollback.accept_(value)
            return False
        self._undo_(objective)
        return True

    def _undo_(self, objective: Objective) -> None:
        """Undo the last step, and raise the damping where it is automatic."""
        self._slow.drop_(objective.memory)
        undo_(objective.parameters, objective.memory)
        self._trust.drop_()
        self._rule.after_rejection(UNDONE_FACTOR)

    def _skipped_(self, objective: Objective, damping: float, can_undo: bool) -> Taken:
        """Skip the step after a model that is not finite; undo the last step if there is one.

        Skipping alone could meet the same model for ever.
        """
        message = "The quadratic model was not finite; the step was skipped."
        warnings.warn(message, RuntimeWarning, stacklevel=8)
        if can_undo:
            self._undo_(objective)
            return Taken({"damping": damping, "rejected": 1.0})
        self._rule.after_ratio(math.nan, 0.0)
        return Taken({"damping": damping})

    def _add_momentum_(self, objective: Objective, update: Direction, before: Before) -> float:
        """Add the slow momentum to a step, and return its coefficient.

        With the safeguard, the momentum is dropped if the objective has grown on its own batch.

        Args:
            objective: The objective; its parameters are those after the step on the batch.
            update: That step; the momentum's part is added to it.
            before: The objective before the step.
        """
        own = {name: tensor.clone() for name, tensor in update.items() if self._safeguard}
        coefficient = self._slow.add_(objective, update, self._trust.fraction)
        if not self._safeguard:
            return coefficient
        if bool(self._reduction.value(objective) <= before.allowed()):
            return coefficient
        for name, tensor in own.items():
            objective.parameters[name].add_(tensor - update[name])
            update[name].copy_(tensor)
        self._slow.drop_(objective.memory)
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """See `Step`."""
        return {
            "adapted": self._reduction.adapted,
            "rule": self._rule.state_dict(),
            "search": self._search.state_dict(),
            "subspace": self._subspace.state_dict(),
            "rollback": self._rollback.state_dict(),
            "slow": self._slow.state_dict(),
            "trust": self._trust.state_dict(),
        }

    def check_state(self, state: Any, parameters: Mapping[str, Tensor]) -> None:
        """See `Step`."""
        check_automatic_state(state, self._rule, parameters)

    def snapshot(self, parameters: Mapping[str, Tensor]) -> Callable[[], None]:
        """See `Step`."""
        state, ratio = self.state_dict(), self._reduction.ratio
        state["rule"] = deepcopy(state["rule"])

        def restore() -> None:
            self.load_state_dict(state, parameters)
            self._reduction.ratio = ratio

        return restore

    def load_state_dict(self, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """See `Step`."""
        self._reduction.adapted = state["adapted"]
        self._rule.load_state_dict(state["rule"])
        self._search.load_state_dict(state["search"])
        self._subspace.load_state_dict(state["subspace"])
        self._rollback.load_state_dict(state["rollback"])
        self._slow.load_state_dict(state["slow"])
        self._trust.load_state_dict(state["trust"], parameters)
