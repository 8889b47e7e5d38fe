"""Trust in the slope along a batch's own direction, from the batches that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.state_schema import FINITE, Record, tensor_of
from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel
from einconv_kfac.optim.vectors import Direction, inner, precise

SMALLEST_TRUST = 0.25
"""Smallest trust. The best value for one step is too small for many steps: directions of small
curvature still have signal where those of large curvature have none left."""
TRUST_DECAY = 0.9
"""Decay of the exponential moving average."""
SAMPLE_BOUNDS = (-1.0, 1.5)
"""Bounds on one sample, so that no single batch decides."""


class SlopeTrust:
    """The fraction of a batch's slope that is not that batch's noise.

    The slope ``g.d`` along ``d = -P g``, made from the same gradient, counts the noise of the
    batch as descent: a quadratic model with this slope predicts a reduction that holds for this
    batch alone. The gradient ``g'`` of the next batch, after an update ``u``, is independent of
    that noise. With the Gauss-Newton matrix ``G``::

        (g'.d - d.G u) / g.d

    is 1 without noise, as for training on one batch, and 0 if there is only noise. It costs
    one inner product and is averaged over steps.

    Attributes:
        fraction: The trust; 1 before the first sample.
    """

    def __init__(self) -> None:
        self.fraction = 1.0
        self._average = 0.0
        self._weight = 0.0
        self._direction: Direction = {}
        self._slope = 0.0
        self._moved = 0.0

    @property
    def average(self) -> float:
        """The bias-corrected average of the samples, without bounds."""
        return self._average / self._weight

    def corrected(self, model: QuadraticModel, descents: int) -> QuadraticModel:
        """Return a model whose first ``descents`` slopes are multiplied by the trust."""
        slope = model.slope.clone()
        slope[:descents] *= self.fraction
        return replace(model, slope=slope)

    def predict_(self, direction: Direction, slope: float, moved: float) -> None:
        """Keep a direction, for the next batch to sample.

        Args:
            direction: ``d``.
            slope: ``g.d`` on the batch that ``d`` comes from.
            moved: ``d.G u``, the change of that slope by the update.
        """
        self._direction, self._slope, self._moved = direction, slope, moved

    def shorten_(self, fraction: float) -> None:
        """Take account of an update that was shortened to a fraction."""
        self._moved *= fraction

    def sample_(self, gradient: Direction) -> None:
        """Average over one more sample, from the next batch's gradient, if a direction is kept."""
        self.accept_(self.pending_sample(gradient).tolist())

    def pending_sample(self, gradient: Direction) -> Tensor:
        """Return ``g'.d`` with the next batch's gradient, ``[1]``; ``[0]`` if there is none."""
        if not (self._direction and self._slope < 0):
            return torch.zeros(0, dtype=torch.float64)
        kept = {
            n: d.to(g.device, precise(g.dtype))
            for n, d in self._direction.items()
            if (g := gradient.get(n)) is not None
        }
        if not kept:  # the next step trains other parameters
            return torch.zeros(0, dtype=torch.float64)
        return inner(gradient, kept).reshape(1)

    def pending_fraction(self, sample: Tensor) -> float | Tensor:
        """Return the trust after a sample that the host has not read, where there is one.

        Args:
            sample: What `pending_sample` returned.
        """
        if not sample.numel():
            return self.fraction
        share = 1 - TRUST_DECAY
        weight = self._weight + share * (1 - self._weight)
        found = ((sample[0] - self._moved) / self._slope).clamp(*SAMPLE_BOUNDS)
        average = (found * share + TRUST_DECAY * self._average) / weight
        return average.clamp(SMALLEST_TRUST, 1.0)

    def accept_(self, slopes: Sequence[float]) -> None:
        """Average over a sample, and drop the direction.

        Args:
            slopes: What `pending_sample` returned, as numbers.
        """
        for slope in slopes:
            sample = (slope - self._moved) / self._slope
            sample = min(max(sample, SAMPLE_BOUNDS[0]), SAMPLE_BOUNDS[1])
            self._average += (1 - TRUST_DECAY) * (sample - self._average)
            self._weight += (1 - TRUST_DECAY) * (1 - self._weight)
        self._bound_()
        self.drop_()

    def _bound_(self) -> None:
        """Set the trust to the average, within its bounds."""
        self.fraction = min(max(self.average, SMALLEST_TRUST), 1.0) if self._weight else 1.0

    def drop_(self) -> None:
        """Drop the direction that is kept."""
        self._direction = {}

    @staticmethod
    def schema(parameters: Mapping[str, Tensor]) -> Record:
        """Return what a state must be.

        Args:
            parameters: The parameters by name.
        """
        own = {
            name: tensor_of(parameter.shape, is_complex=parameter.is_complex())
            for name, parameter in parameters.items()
        }
        numbers = dict.fromkeys(("average", "weight", "slope", "moved"), FINITE)
        return Record({**numbers, "direction": Record(own, optional=True)})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers."""
        return {
            "average": self._average,
            "weight": self._weight,
            "direction": self._direction,
            "slope": self._slope,
            "moved": self._moved,
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take over a state; tensors are copied to the device of the parameters that are given."""
        self._average, self._weight = state["average"], state["weight"]
        self._slope, self._moved = state["slope"], state["moved"]
        self._bound_()
        self._direction = {
            name: tensor.to(parameters.get(name, tensor).device, copy=True)
            for name, tensor in state["direction"].items()
        }
