"""What an automatic step does before the host reads its first numbers, and these numbers.

They decide whether the step is taken. An ordinary step, without a fit or an inversion, is prepared
as if it were, so that the host reads everything that it needs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.running import snapshot_of
from einconv_kfac.optim.replay.checks import check_weights
from einconv_kfac.optim.step.damping.damping_source import DampingSource
from einconv_kfac.optim.step.damping.first_curvature import FirstCurvature
from einconv_kfac.optim.step.fits.carried_fit import CarriedMix
from einconv_kfac.optim.step.fits.fit import Momentum
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.objective import Objective, is_late
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.step.step_fit import BegunFit, StepFit


def _nothing() -> None:
    """Restore nothing, for nothing was changed."""


@dataclass(frozen=True)
class Begun:
    """A step that was begun.

    Args:
        damping: Its damping; not a number as long as the first one is not known.
        mix: Its directions with the coefficients of the last fit, if these hold.
        fit: Its fit, if one is due.
        undo_: Restores what was changed.
        first: What the first damping follows from.
    """

    damping: float
    mix: CarriedMix | None = None
    fit: BegunFit | None = None
    undo_: Callable[[], None] = _nothing
    first: FirstCurvature | None = None


@dataclass(frozen=True)
class FirstNumbers:
    """Numbers on the host.

    Args:
        value: The objective.
        slopes: The sample of the trust, if there is one.
        products: The inner products of the mix.
        are_repeated: Whether the model has repeated its outputs, as far as that was left open.
    """

    value: float
    slopes: Sequence[float]
    products: Sequence[float]
    are_repeated: bool = True


@dataclass(frozen=True)
class FirstReading:
    """Begins steps, and reads their first numbers.

    Args:
        curvature: Running curvature of the model.
        fit: Fits steps.
        trust: The trust in slopes.
        dampings: The damping of each step.
    """

    curvature: RunningCurvature
    fit: StepFit
    trust: SlopeTrust
    dampings: DampingSource

    def checked(self, objective: Objective, *, may_doubt: bool) -> Objective:
        """Return the objective with batches that can be replayed at the present point.

        Args:
            objective: The objective.
            may_doubt: Whether `numbers` and `settled_` follow, which complete the first check: on a
                GPU the host does not wait for its numbers.
        """
        replay = self.curvature.replay
        at = objective.batches, objective.parameters, objective.gradient
        if replay.is_checked or not (may_doubt and is_late(objective)):
            if not replay.is_checked:
                objective.finite.require_()
            return replace(objective, batches=replay.check(*at))
        with replay.doubting() as doubts:
            batches = replay.check(*at)
        replay.is_checked = not doubts
        return replace(objective, batches=batches, doubts=doubts)

    def begun_(self, objective: Objective, momentum: Momentum) -> Begun:
        """Begin a step that needs no fit, since neither inverses nor other numbers are due.

        Args:
            objective: The objective.
            momentum: The momentum.
        """
        undo_, damping = self._undo(), self.damping_(objective)
        assert damping is not None
        return Begun(damping, self.fit.mixed_(objective, momentum, damping), None, undo_)

    def begun_fit_(self, objective: Objective, momentum: Momentum) -> Begun | None:
        """Begin a step that is fitted to its batch, on a GPU; ``None`` where that cannot be.

        Whatever fails is left to the host to meet again, once it knows that the step is taken.

        Args:
            objective: The objective, whose batches were checked.
            momentum: The momentum.
        """
        if not is_late(objective):
            return None
        undo_ = self._undo()
        try:
            if not self.dampings.is_known(objective, self.curvature.steps):
                first = FirstCurvature(self.curvature.replay, objective)
                return Begun(math.nan, undo_=undo_, first=first)
            damping = self.damping_(objective)
            assert damping is not None
            if (fit := self.fit.begun_(objective, momentum, damping)) is not None:
                return Begun(damping, None, fit, undo_)
        except RuntimeError:
            pass
        undo_()
        return None

    def _undo(self) -> Callable[[], None]:
        """Return a function that restores what beginning a step changes."""
        restore, factor = snapshot_of(self.curvature.layers), self.dampings.factor

        def undo_() -> None:
            restore()
            self.dampings.factor = factor

        return undo_

    def damping_(self, objective: Objective) -> float | None:
        """Update the factors, and return the damping; ``None`` as long as there is none."""
        self.dampings.relax_()
        damping = self.dampings.damping_(objective, self.curvature.steps)
        self.curvature.update_()
        return damping

    def continue_(self, begun: Begun) -> Begun | None:
        """Update the factors in the first step, whose damping the host has not read."""
        try:
            self.dampings.relax_()
            self.curvature.update_()
        except RuntimeError:
            begun.undo_()
            return None
        return begun

    def settled_(
        self, objective: Objective, begun: Begun | None, first: FirstNumbers
    ) -> Begun | None:
        """Return the step that is taken; ``None`` if there is no damping yet.

        Args:
            objective: The objective.
            begun: The step, if it was begun.
            first: Its first numbers.

        Raises:
            RuntimeError: If the model does not repeat its outputs, or the first damping cannot be.
        """
        if not first.are_repeated:
            if begun is not None:
                begun.undo_()
            at = objective.batches[0], objective.parameters, objective.gradient
            self.curvature.replay.check_products_(*at)
            begun = None
        if begun is None:
            damping = self.damping_(objective)
        elif begun.first is None:
            return begun
        else:
            damping = self.dampings.first_(begun.first, first.value, self.curvature.steps)
        return None if damping is None else Begun(damping)

    def asked(self, objective: Objective, begun: Begun | None) -> tuple[Tensor, Unread]:
        """Ask for the first numbers of a step.

        Args:
            objective: The objective.
            begun: The step, if it was begun.

        Returns:
            The sample of the trust, ``[1]``, or ``[0]`` if there is none, and all numbers.
        """
        weights = [batch.weight for batch in objective.batches]
        value, none = objective.value(), torch.zeros(0)
        flag = none if objective.finite.is_known else objective.finite.flag
        mixed = none if begun is None or begun.mix is None else begun.mix.numbers
        sample = self.trust.pending_sample(objective.gradient)
        doubts = torch.stack([*objective.doubts]) if objective.doubts else none
        return sample, Unread(flag, value, sample, mixed, doubts, *weights)

    def numbers(self, objective: Objective, asked: Unread) -> FirstNumbers:
        """Return the first numbers of a step.

        Args:
            objective: The objective.
            asked: All numbers.

        Raises:
            NotFiniteError: If a gradient or a loss is not finite.
            RuntimeError: If the weight of a loss is negative.
        """
        flags, (own,), slopes, numbers, doubts, *known = asked.read()
        for each in flags:
            objective.finite.confirm_(each)
        check_weights([each for part in known for each in part])
        if objective.doubts:
            self.curvature.replay.is_checked = all(doubts)
        return FirstNumbers(own, slopes, numbers, all(doubts))
