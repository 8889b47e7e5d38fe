"""The step that a GPU takes before the host has read how long it is, or whether another is better.

The host has nothing else to ask for while it waits for these numbers, and would wait again for the
objective after the step. So the device is asked for that first. Parameters stay as they are, and
what turns out not to be needed is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einconv_kfac.optim.step.comparison.reduction import Reduction
from einconv_kfac.optim.step.fits.fit import Fit, StepAhead
from einconv_kfac.optim.step.objective import Objective, is_late
from einconv_kfac.optim.vectors import multiplied


@dataclass(frozen=True)
class AskingAhead:
    """Asks a GPU for steps, and for the objective after them.

    Args:
        reduction: Compares steps.
    """

    reduction: Reduction

    def step(
        self, objective: Objective, fit: Fit, step: int, factor: Tensor | None = None
    ) -> StepAhead | None:
        """Return a step, and the objective after it if the two are going to be compared.

        It is ``None`` on other devices, and where the fit has failed. An evaluation that fails is
        left to the host, which meets that again when it takes the step.

        Args:
            objective: The objective.
            fit: The step without learning rates.
            step: The number of steps taken before.
            factor: What it is multiplied by, a number on the device, or ``None``.
        """
        if not is_late(objective) or fit.is_failure:
            return None
        update = fit.update(objective, max(objective.rates.values()))
        if factor is not None:
            update = dict(zip(update, multiplied([*update.values()], factor)))
        if not self.reduction.ask_(objective, step, is_bounded=True, is_fitted=True):
            return StepAhead(update)
        own = [objective.parameters[name] for name in update]
        moved = dict(zip(update, torch._foreach_add(own, [*update.values()])))
        try:
            return StepAhead(update, self.reduction.evaluated(objective, moved))
        except (RuntimeError, ValueError):
            return StepAhead(update)

    def with_step(self, objective: Objective, fit: Fit, step: int) -> Fit:
        """Return a fit with its step; for the arguments see `step`."""
        return replace(fit, ahead=self.step(objective, fit, step))
