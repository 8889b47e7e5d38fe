"""The true by the predicted change of the objective, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import ref

import torch
from torch import Tensor

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.schedule import interval
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.comparison.backtracking import backtrack_
from einconv_kfac.optim.step.damping.levenberg_marquardt import ADAPTATION_PERIOD
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.fits.fit import Fit, StepAhead
from einconv_kfac.optim.step.in_place import add_
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts
from einconv_kfac.optim.step.objective import Objective, common_momentum
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.step.rounding import ROUNDING_MARGIN, rounding_of
from einconv_kfac.optim.vectors import Direction

BACKTRACKED_FACTOR = 2.0
"""Factor by which the damping and its floor grow when a step is shortened."""
FAILURE_RATIO = 1 / 4
"""Ratio of a predicted reduction below which the damping adapts even if that is not due."""
RELATIVE_ROUNDING = 1e-4
"""Growth of the objective, relative to its size, that is attributed to rounding."""


@dataclass(frozen=True)
class Before:
    """The objective before a step.

    Args:
        value: Its value.
        rounding: Its rounding error, if the change by the step is to be compared.
        adapts: Whether the damping adapts to that change.
    """

    value: Tensor
    rounding: Tensor | None
    adapts: bool = True

    def allowed(self, predicted: float = 0.0) -> Tensor:
        """Return the largest value after the step that does not count as growth.

        Args:
            predicted: The predicted change; it may be a growth.
        """
        tolerance = RELATIVE_ROUNDING * self.value.abs()
        if self.rounding is not None:
            tolerance = tolerance.maximum(ROUNDING_MARGIN * self.rounding)
        return self.value + tolerance + max(predicted, 0.0)


@dataclass(frozen=True)
class Compared:
    """A step that is compared.

    Args:
        predicted: The change that the model predicted.
        products: Its inner products by layer, if they are known.
        step: The number of steps taken before.
    """

    predicted: float
    products: Mapping[str, LayerProducts] | None
    step: int


class Reduction:
    """Compares the change of the objective by a step with the predicted one.

    The comparison is made on the batch of the step: where that was fitted to it, which is about
    every `ADAPTATION_PERIOD` steps and where the last coefficients do not hold, or, as a safeguard,
    after every step. With a given momentum every step is fitted, and one per period is compared.

    Args:
        replay: Runs the model again.
        rule: The damping rule, which adapts to the ratio.
        is_sufficient: Returns whether the damping of a step is large enough to leave it where
            shortening the step helps.
        noise: Returns how much batches differ at one point; see `Agreement`.
        safeguard: Whether to compare after every step.

    Attributes:
        ratio: The last ratio of a predicted change above the rounding of the objective.
        adapted: The step at which the damping was adapted last.
    """

    def __init__(
        self,
        replay: Replay,
        rule: DampingRule,
        is_sufficient: Callable[[int], bool],
        noise: Callable[[], float],
        safeguard: bool,
    ) -> None:
        self._replay = replay
        self._rule, self._is_sufficient = rule, is_sufficient
        self._noise = noise
        self._safeguard = safeguard
        self.adapted: int | None = None
        self.ratio = math.nan
        self._asked: tuple[ref[Objective], Tensor, Tensor] | None = None
        self._known: tuple[list[int], Tensor] | None = None  # versions of parameters, value there

    def before(
        self, objective: Objective, fit: Fit, step: int, others: float = 0.0
    ) -> Before | None:
        """Return the objective before a step, with its rounding if the step is to be compared.

        It is ``None`` if it is not needed.

        Args:
            objective: The objective.
            fit: The step; one that was shortened is compared if the damping is given.
            step: The number of steps taken.
            others: The change by terms that the recorded losses do not contain.
        """
        is_fitted = not fit.is_carried
        adapts = is_fitted and self.is_due(objective, step)
        self._known, asked = None, self._asked
        self._asked = None
        compared = self._compares(objective, step, is_bounded=fit.is_bounded, is_fitted=is_fitted)
        if not compared and not self._safeguard:
            return None
        if asked is not None and asked[0]() is objective:
            return Before(asked[1] - others, asked[2], adapts)
        rounding = rounding_of(self._replay, objective) if compared else None
        return Before(objective.value() - others, rounding, adapts)

    def ask_(self, objective: Objective, step: int, *, is_bounded: bool, is_fitted: bool) -> bool:
        """Ask for what `before` will return, if the step is to be compared; return whether it is.

        Args:
            objective: The objective.
            step: The number of steps taken.
            is_bounded: Whether the step is likely to be shortened.
            is_fitted: Whether the step is fitted to its batch.
        """
        if not self._compares(objective, step, is_bounded=is_bounded, is_fitted=is_fitted):
            return False
        if self._asked is None or self._asked[0]() is not objective:
            value, rounding = objective.value(), rounding_of(self._replay, objective)
            self._asked = ref(objective), value, rounding
        return True

    def move_(self, objective: Objective, update: Direction, ahead: StepAhead | None) -> None:
        """Add a step to the parameters.

        Args:
            objective: The objective.
            update: The step.
            ahead: The same, if a GPU was asked for it.
        """
        parameters = [objective.parameters[name] for name in update]
        add_(parameters, [*update.values()])
        if ahead is not None and ahead.value is not None:
            self._known = _versions(objective), ahead.value

    def _compares(
        self, objective: Objective, step: int, *, is_bounded: bool, is_fitted: bool
    ) -> bool:
        """Return whether a step is to be compared."""
        if objective.settings.damping is not None:
            return is_bounded
        if self._safeguard or (is_fitted and common_momentum(objective) is None):
            return True
        return is_fitted and self.is_due(objective, step)

    def asked(self, objective: Objective, before: Before, predicted: float) -> Tensor | None:
        """Return the numbers of `adapt_`, ``[3]``; ``None`` if the step is not to be compared.

        Args:
            objective: The objective; its parameters are the new ones.
            before: The objective before the step.
            predicted: The change that the model predicted.
        """
        if before.rounding is None or not predicted:
            return None
        difference, allowed = self.value(objective) - before.value, before.allowed(predicted)
        return torch.stack([difference, before.rounding, allowed - before.value])

    def adapt_(
        self,
        objective: Objective,
        update: Direction,
        before: Before,
        at: Compared,
        numbers: Sequence[float],
    ) -> float:
        """Adapt the damping to the change of the objective and the predicted one.

        A predicted change within the rounding of the objective leaves the damping alone. Where
        the objective has grown instead, the step is shortened until it does not grow.

        Args:
            objective: The objective; its parameters are the new ones.
            update: The step that was just taken; it is shortened in place.
            before: The objective before the step.
            at: The step as the model sees it.
            numbers: The change, its rounding, and the largest change that is no growth.

        Returns:
            The fraction of the step that is left.
        """
        (change, rounding, growth), predicted = numbers, at.predicted
        due, left = at.step if before.adapts else None, 1.0
        if not change <= growth:
            allowed = before.allowed(predicted)
            left = backtrack_(objective.parameters, update, lambda: self.value(objective), allowed)
        is_enough = 0 < left < 1 and self._is_sufficient(at.step)
        self._adapt_rule_(change, predicted, rounding, due, is_enough=is_enough)
        is_known = abs(predicted) > ROUNDING_MARGIN * rounding or not math.isfinite(change)
        if left < 1 and is_known and not is_enough:
            self._rule.after_rejection(BACKTRACKED_FACTOR)
        return left

    def _adapt_rule_(
        self,
        change: float,
        predicted: float,
        rounding: float,
        step: int | None,
        *,
        is_enough: bool,
    ) -> None:
        """Keep the ratio, and adapt the damping to it if due or low, unless it is one of roundings.

        Nor is it adapted where it is enough to have shortened the step.

        A loss that did not change in any bit was rounded to the same number.
        """
        is_known = change != 0 and abs(predicted) > ROUNDING_MARGIN * rounding
        if is_known:
            self.ratio = change / predicted
        if step is not None:
            self.adapted = step
        is_failure = predicted < 0 and not self.ratio >= FAILURE_RATIO
        if is_known and not is_enough and (step is not None or is_failure):
            self._rule.after_ratio(self.ratio, predicted, self._noise())

    def expect_(
        self, objective: Objective, before: Before, agreement: Agreement, step: int
    ) -> None:
        """Evaluate the objective after a step, for the next batch to be compared with, if due.

        Args:
            objective: The objective; its parameters are the new ones.
            before: The objective before the step.
            agreement: Compares it with the next batch's.
            step: The number of steps taken before.
        """
        if before.rounding is None or not agreement.is_due(step):
            return
        numbers = Unread(before.value, self.value(objective), before.rounding)
        agreement.expect_later_(numbers, step)

    def is_due(self, objective: Objective, step: int) -> bool:
        """Return whether the damping is to adapt after a step that is fitted to its batch.

        Where not every step is fitted, those that are come forward by up to half a period, since a
        step that is fitted for this alone would cost more.

        Args:
            objective: The objective.
            step: The number of steps taken before.
        """
        if self.adapted is None:
            return True
        least = 0.5 if common_momentum(objective) is None else 1.0
        return step - self.adapted >= least * interval(step, ADAPTATION_PERIOD)

    def value(self, objective: Objective) -> Tensor:
        """Return the objective at the present parameters, evaluated once after each change."""
        versions = _versions(objective)
        if self._known is None or self._known[0] != versions:
            self._known = versions, self.evaluated(objective)
        return self._known[1]

    def evaluated(self, objective: Objective, given: Direction | None = None) -> Tensor:
        """Return the objective at its parameters, or at others if they are given."""
        losses = [b.weight * self._replay.batch_loss(b, given) for b in objective.batches]
        return replace(objective, parameters=given or objective.parameters).with_decay(losses)


def _versions(objective: Objective) -> list[int]:
    """Return the versions of the parameters, which every change in place counts up."""
    return [parameter._version for parameter in objective.parameters.values()]
