"""What an automatic step does before the host reads its first numbers, and these numbers.

They decide whether the step is taken. An ordinary step, without a fit or an inversion, is prepared
as if it were, so that the host reads everything that it needs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.curvature_state import snapshot_of
from einconv_kfac.optim.replay.checks import check_weights
from einconv_kfac.optim.step.carried_fit import CarriedMix
from einconv_kfac.optim.step.damping.damping_source import DampingSource
from einconv_kfac.optim.step.fit import Momentum
from einconv_kfac.optim.step.objective import Objective, on_gpu
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.step.slope_trust import SlopeTrust
from einconv_kfac.optim.step.step_fit import BegunFit, StepFit


def _nothing() -> None:
    """Restore nothing, for nothing was changed."""


@dataclass(frozen=True)
class Begun:
    """A step that was begun.

    Args:
        damping: Its damping.
        mix: Its directions with the coefficients of the last fit, if these hold.
        fit: Its fit, if one is due.
        undo_: Restores what was changed.
    """

    damping: float
    mix: CarriedMix | None = None
    fit: BegunFit | None = None
    undo_: Callable[[], None] = _nothing


@dataclass(frozen=True)
class FirstNumbers:
    """Numbers on the host.

    Args:
        value: The objective.
        slopes: The sample of the trust, if there is one.
        products: The inner products of the mix.
    """

    value: float
    slopes: Sequence[float]
    products: Sequence[float]


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
        if not on_gpu(objective) or objective.workers.size > 1:
            return None
        if not self.dampings.is_known(objective, self.curvature.steps):
            return None
        undo_ = self._undo()
        try:
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
        return sample, Unread(flag, value, sample, mixed, *weights)

    def numbers(self, objective: Objective, asked: Unread) -> FirstNumbers:
        """Return the first numbers of a step.

        Args:
            objective: The objective.
            asked: All numbers.

        Raises:
            NotFiniteError: If a gradient or a loss is not finite.
            RuntimeError: If the weight of a loss is negative.
        """
        flags, (own,), slopes, numbers, *known = asked.read()
        for each in flags:
            objective.finite.confirm_(each)
        check_weights([each for part in known for each in part])
        return FirstNumbers(own, slopes, numbers)
