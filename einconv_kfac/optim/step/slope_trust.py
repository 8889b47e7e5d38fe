"""How much of the slope along a batch's own direction other batches confirm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from einconv_kfac.optim.step.quadratic_model import QuadraticModel
from einconv_kfac.optim.vectors import Direction, inner

SMALLEST = 0.25
"""Smallest fraction. What is best for one step is too little for many, as the directions of small
curvature still have signal where those of large curvature have none left."""
DECAY = 0.9
"""Decay of the running average."""
RANGE = (-1.0, 1.5)
"""Bounds on one sample, so that no single batch decides."""


class Signal:
    """The fraction of a batch's slope that is not that batch's noise.

    The slope ``g.d`` along ``d = -P g``, made from the same gradient, counts the noise of the
    batch as descent; a quadratic model with it foresees a reduction that holds for this batch
    alone. The gradient ``g'`` of the next batch, after an update ``u``, knows nothing of that
    noise. With the Gauss-Newton matrix ``G``::

        (g'.d - d.G u) / g.d

    is 1 without noise, as for training on one batch, and 0 where there is nothing else. It costs
    one inner product and is averaged over steps.
    """

    def __init__(self) -> None:
        self._average = 0.0
        self._weight = 0.0
        self._direction: Direction = {}
        self._slope = 0.0
        self._moved = 0.0

    @property
    def fraction(self) -> float:
        """The fraction; 1 as long as nothing is known."""
        if not self._weight:
            return 1.0
        return min(max(self._average / self._weight, SMALLEST), 1.0)

    def corrected(self, model: QuadraticModel, descents: int) -> QuadraticModel:
        """Return a model that trusts the slopes of the first ``descents`` directions that far."""
        slope = model.slope.clone()
        slope[:descents] *= self.fraction
        return replace(model, slope=slope)

    def expect_(self, direction: Direction, slope: float, moved: float) -> None:
        """Note what the next batch is to confirm.

        Args:
            direction: ``d``.
            slope: ``g.d`` on the batch that ``d`` comes from.
            moved: ``d.G u``, the change of that slope by the update.
        """
        self._direction, self._slope, self._moved = direction, slope, moved

    def learn_(self, gradient: Direction) -> None:
        """Learn from the next batch's gradient, if something was noted."""
        if self._direction and self._slope < 0:
            noted = {n: d.to(gradient[n]) for n, d in self._direction.items() if n in gradient}
            held = float(inner(gradient, noted)) - self._moved
            sample = min(max(held / self._slope, RANGE[0]), RANGE[1])
            self._average += (1 - DECAY) * (sample - self._average)
            self._weight += (1 - DECAY) * (1 - self._weight)
        self.forget_()

    def forget_(self) -> None:
        """Forget what was noted."""
        self._direction = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers."""
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take over a state; tensors are copied to the device of the parameters."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)
        self._direction = {
            name: tensor.to(parameters[name], copy=True)
            for name, tensor in state["direction"].items()
        }
