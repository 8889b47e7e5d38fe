"""The automatic step: step size, momentum and damping from the exact quadratic model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.replay.unknown_operations import NO_LOSS
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.comparison.asking_ahead import AskingAhead
from einconv_kfac.optim.step.comparison.guarded_momentum import GuardedMomentum
from einconv_kfac.optim.step.comparison.reduction import Compared, Reduction
from einconv_kfac.optim.step.comparison.unobserved import UnobservedTerms
from einconv_kfac.optim.step.damping.damping_source import DampingSource
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.decoupled_decay import decay_
from einconv_kfac.optim.step.first_reading import Begun, FirstNumbers, FirstReading
from einconv_kfac.optim.step.fits.fit import Fit, Momentum
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.fits.subspace import SubspaceFit
from einconv_kfac.optim.step.momentum.layer_gains import mean_gain
from einconv_kfac.optim.step.momentum.slow_momentum import SlowMomentum
from einconv_kfac.optim.step.objective import Objective, common_momentum
from einconv_kfac.optim.step.policy_bound import PolicyBound
from einconv_kfac.optim.step.prepared_update import Preparation, PreparedUpdate
from einconv_kfac.optim.step.promise import Promise
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER, Rollback, last_update, undo_
from einconv_kfac.optim.step.states.automatic_state import check_automatic_state
from einconv_kfac.optim.step.step_fit import StepFit
from einconv_kfac.optim.step.step_protocol import Statistics, Taken
from einconv_kfac.optim.vectors import Direction

UNDONE_FACTOR = 4.0
"""Factor by which the damping grows when a step is undone or skipped."""
FAILURE = (
    "The quadratic model was not finite, or its step would change nothing or everything; the step "
    "was skipped, and the damping was raised. Later failures are not reported."
)


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
        self._curvature, self._replay = curvature, curvature.replay
        curvature.recorder.keeps_outputs = True
        self._rule, self._rollback = rule, Rollback()
        self._trust, self._agreement, self._slow = SlopeTrust(), Agreement(), SlowMomentum()
        self._promise = Promise(self._rollback, self._agreement)
        self._dampings = DampingSource(rule, self._replay)
        own = rule, self._dampings.is_sufficient, lambda: self._agreement.noise, safeguard
        self._reduction = Reduction(self._replay, *own)
        subspace = SubspaceFit(curvature, self._trust, self._agreement)
        self._fit = StepFit(curvature, subspace, AskingAhead(self._reduction), self._agreement)
        self._preparation = Preparation(self._fit.subspace, self._trust, self._slow, safeguard)
        self._guarded = GuardedMomentum(self._slow, self._reduction, safeguard)
        self._first = FirstReading(curvature, self._fit, self._trust, self._dampings)
        self._warned = False
        self._policy = PolicyBound(self._replay, self._trust, self._agreement, self._slow)
        self._unobserved = UnobservedTerms(self._replay)

    def check(self, objective: Objective) -> None:
        """See `Step`."""
        if objective.parameters and not objective.batches:
            raise RuntimeError(NO_LOSS)

    def take_(self, objective: Objective) -> Taken:
        """See `Step`."""
        momentum = common_momentum(objective)
        is_due = momentum is not None or self._is_due(objective)
        self._replay.check_recorded(objective.batches)
        objective = self._first.checked(objective, may_doubt=True) if is_due else objective
        slow = self._slow.direction(objective.memory, objective.rates)
        previous = last_update(objective.memory)
        followed = Momentum(slow if momentum is None else previous, momentum)
        begin_ = self._first.begun_fit_ if is_due else self._first.begun_
        begun = begin_(objective, followed)
        sample, asked = self._first.asked(objective, begun)
        mix, prepared = None if begun is None else begun.mix, None
        if asked.is_late and mix is not None:
            prepared = self._preparation.prepared(objective, followed.direction, mix, sample)
            self._ask_(objective, is_fitted=False)
        if begun is not None and begun.first is not None:
            begun = self._first.continue_(begun)
        elif begun is not None and begun.fit is not None:
            self._ask_(objective)
        first = self._first.numbers(objective, asked)
        if previous and self._rollback.is_needed(first.value):
            if begun is not None:
                begun.undo_()
            self._undo_(objective)
            damping = self._dampings.damping_(objective, self._curvature.steps)
            taken = Taken({"damping": damping or math.nan, "rejected": 1.0})
        else:
            self._rollback.accept_(first.value)
            self._agreement.sample_(first.value)
            self._trust.accept_(first.slopes)
            begun = self._first.settled_(objective, begun, first)
            if begun is None:
                return Taken({})
            taken = self._carried_(objective, followed, begun, first, prepared) or self._fitted_(
                objective, followed, begun, is_due=is_due
            )
            self._policy.bound_(objective)
            self._slow.restart_(objective.memory, first.value, repeats=not self._agreement.noise)
        is_next = momentum is not None or self._is_due(objective, self._curvature.steps + 1)
        self._curvature.recorder.keeps_layers = is_next
        return taken

    def _carried_(
        self,
        objective: Objective,
        followed: Momentum,
        begun: Begun,
        first: FirstNumbers,
        prepared: PreparedUpdate | None,
    ) -> Taken | None:
        """Take a step with the coefficients of the last fit, unless they do not hold.

        Args:
            objective: The objective.
            followed: The slow momentum.
            begun: The step that was begun.
            first: Its first numbers.
            prepared: Its update, if that was prepared.
        """
        if begun.mix is None:
            return None
        if (found := self._fit.subspace.carried(objective, begun.mix, first.products)) is None:
            return None
        exceeds = -found.along.slope > self._rollback.value
        fit = self._promise.kept(found, self._curvature.steps) if exceeds else found
        ahead = prepared if fit is found else None
        if ahead and self._preparation.is_right(ahead, objective, fit, first.products):
            update, numbers = self._preparation.take_(objective, ahead, fit)
            return self._taken(update, {"damping": begun.damping, **numbers})
        return self._tried_(objective, followed, fit, begun.damping)

    def _is_due(self, objective: Objective, step: int | None = None) -> bool:
        """Return whether a step, by default the coming one, is to be fitted to its batch."""
        step = self._curvature.steps if step is None else step
        is_given = objective.settings.damping is not None
        if self._fit.is_due(step, is_given=is_given):
            return True
        return not is_given and self._rule.damping(step) is None

    def _fitted_(
        self, objective: Objective, followed: Momentum, begun: Begun, *, is_due: bool
    ) -> Taken:
        """Fit the step, and take it.

        Args:
            objective: The objective; if a fit is due, its batches were checked.
            followed: The momentum; without coefficient it is the slow momentum.
            begun: The step that was begun.
            is_due: Whether a fit is due.
        """
        if not is_due:
            objective = self._first.checked(objective, may_doubt=False)
        fit = self._fit.best_(objective, followed, begun.damping, begun.fit)
        fit = self._promise.kept(fit, self._curvature.steps)
        return self._tried_(objective, followed, fit, begun.damping)

    def _tried_(self, objective: Objective, followed: Momentum, fit: Fit, damping: float) -> Taken:
        """Take a step, or skip it if its model failed."""
        if fit.is_failure:
            return self._skipped_(objective, damping, bool(last_update(objective.memory)))
        return self._moved_(objective, followed, fit, damping)

    def _moved_(self, objective: Objective, followed: Momentum, fit: Fit, damping: float) -> Taken:
        """Move the parameters by a step and by the slow momentum, as far as they prove good."""
        rate, steps = max(objective.rates.values()), self._curvature.steps
        update = fit.update(objective, rate) if fit.ahead is None else fit.ahead.update
        others = self._unobserved.change(fit, rate, objective)
        before = self._reduction.before(objective, fit, steps, others)
        self._reduction.move_(objective, update, fit.ahead)
        predicted = fit.predicted(rate)
        trust, is_slow = self._trust.fraction, followed.coefficient is None
        left, added = 1.0, None
        if before is not None:
            whole = fit.scaled(rate).products if is_slow else None
            at = Compared(predicted, whole, steps)
            left, added = self._guarded.adapt_(objective, update, before, at, trust)
        if left < 1:
            self._fit.subspace.drop_()
        fit = fit.scaled(rate * left)
        coefficient = fit.mix[-1] if added is None else added
        if is_slow and added is None:
            coefficient = self._guarded.add_(objective, update, before, trust, fit.products)
        if objective.settings.decoupled_weight_decay:
            decay_(objective, update)
        if before is not None:
            self._reduction.expect_(objective, before, self._agreement, steps)
        coefficient = coefficient if followed.direction else 0.0
        for name, tensor in update.items():
            objective.memory[name][MOMENTUM_BUFFER] = tensor
        if fit.is_exact:
            moved = fit.moved(coefficient if is_slow else 0.0)
            self._trust.predict_(fit.directions[0], fit.along.first_slope, moved)
        numbers = {"damping": damping, "step_size": fit.mix[0], "momentum": coefficient}
        return self._taken(update, {**numbers, "predicted": predicted})

    def _ask_(self, objective: Objective, *, is_fitted: bool = True) -> None:
        """Ask for the objective before a step, with which the step is likely to be compared."""
        is_bounded, step = is_fitted or self._fit.subspace.was_bounded, self._curvature.steps
        self._reduction.ask_(objective, step, is_bounded=is_bounded, is_fitted=is_fitted)

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

    def _undo_(self, objective: Objective) -> None:
        """Undo the last step, and raise the damping."""
        self._slow.drop_(objective.memory)
        undo_(objective.parameters, objective.memory)
        self._trust.drop_()
        self._agreement.drop_()
        self._fit.subspace.drop_()
        self._dampings.raise_(UNDONE_FACTOR)

    def _skipped_(self, objective: Objective, damping: float, can_undo: bool) -> Taken:
        """Skip a step that failed, and raise the damping; undo the last step if there is one.

        Skipping alone could meet the same model for ever. The first failure is reported.
        """
        if not self._warned:
            self._warned = True
            warnings.warn(FAILURE, RuntimeWarning, stacklevel=8)
        if can_undo:
            self._undo_(objective)
            return Taken({"damping": damping, "rejected": 1.0})
        self._dampings.raise_(UNDONE_FACTOR)
        return Taken({"damping": damping})

    def state_dict(self) -> dict[str, Any]:
        """See `Step`."""
        return {
            "adapted": self._reduction.adapted,
            "agreement": self._agreement.state_dict(),
            "keeps_layers": self._curvature.recorder.keeps_layers,
            "raised": self._dampings.factor,
            "first": self._dampings.first,
            "rule": self._rule.state_dict(),
            "search": self._fit.search.state_dict(),
            "subspace": self._fit.subspace.state_dict(),
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
        self._agreement.load_state_dict(state["agreement"])
        self._curvature.recorder.keeps_layers = state["keeps_layers"]
        self._dampings.factor = state["raised"]
        self._dampings.first = state["first"]
        self._rule.load_state_dict(state["rule"])
        self._fit.search.load_state_dict(state["search"])
        self._fit.subspace.load_state_dict(state["subspace"])
        self._rollback.load_state_dict(state["rollback"])
        self._slow.load_state_dict(state["slow"])
        self._trust.load_state_dict(state["trust"], parameters)
