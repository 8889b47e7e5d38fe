"""The automatic step: step size, momentum and damping from the exact quadratic model."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from einconv_kfac.optim.objective import Objective
from einconv_kfac.optim.quadratic import QuadraticModel
from einconv_kfac.optim.recording import Recorder
from einconv_kfac.optim.settings import is_due

INITIAL_DAMPING = 0.1
"""First damping, as a multiple of the curvature along the first gradient."""
SMALLEST_DAMPING = 1e-2
"""Smallest damping, as a multiple of the first: on the batch it was fitted to, even a step
that follows noise reduces the loss as predicted."""
LARGEST_MOMENTUM = 0.95
"""Bound on the coefficient of the previous update; the quadratic model of one small batch is
no guide to a larger one. The other bound is zero."""
ADAPTATION_PERIOD = 5
"""Steps between two adaptations of the damping."""
ADAPTATION = (19 / 20) ** ADAPTATION_PERIOD
"""Factor of one adaptation (Martens and Grosse, 2015, section 6.5)."""


class AutomaticStep:
    """Levenberg-Marquardt damping, and the best combination of directions.

    Args:
        recorder: Runs the model again on the recorded batches.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._damping: float | None = None
        self._floor = 0.0
        self._adapted: int | None = None
        self.ratio = math.nan

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

    def coefficients(
        self, model: QuadraticModel, damping: float, momentum: float | None, previous: int | None
    ) -> Tensor:
        """Return the coefficients ``[m]`` that minimise the model.

        Args:
            model: The model.
            damping: The damping.
            momentum: The coefficient of the previous update if it is given.
            previous: The index of the previous update if there is one.
        """
        if previous is None:
            return model.minimum(damping)
        if momentum is None:
            coefficients = model.minimum(damping)
            momentum = float(coefficients[previous])
            if 0 <= momentum <= LARGEST_MOMENTUM:
                return coefficients
            momentum = min(max(momentum, 0.0), LARGEST_MOMENTUM)
        return model.minimum(damping, {previous: momentum})

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
        return {"damping": self._damping, "floor": self._floor, "adapted": self._adapted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._damping = state["damping"]
        self._floor = state["floor"]
        self._adapted = state["adapted"]
