"""A fit in two parts, after each of which the host reads numbers of the device.

The device is asked for the quadratic model first, and for what decides the length of the step
once the host has read the model. On a GPU other work may be asked for before either is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.fits.fit import Along, Fit, Momentum
from einconv_kfac.optim.step.fits.quadratic_model import (
    PendingModel,
    Products,
    QuadraticModel,
    quadratic_model,
)
from einconv_kfac.optim.step.momentum.layer_products import PendingProducts
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.vectors import Direction


@dataclass(frozen=True)
class PendingFit:
    """A fit whose quadratic model the device was asked for.

    Args:
        objective: The objective.
        directions: The descent directions, and the momentum if it is part of the subspace.
        descents: Number of descent directions.
        momentum: The momentum.
        products: The Jacobian-vector products that are known.
        pending: The model.
    """

    objective: Objective
    directions: Sequence[Direction]
    descents: int
    momentum: Momentum
    products: Products
    pending: PendingModel

    @property
    def has_momentum(self) -> bool:
        """Whether the momentum is part of the subspace."""
        return len(self.directions) > self.descents

    @property
    def fixed(self) -> dict[int, float] | None:
        """The coefficients that are given, by index."""
        return {self.descents: self.momentum.coefficient or 0.0} if self.has_momentum else None

    def model(self, replay: Replay) -> QuadraticModel:
        """Return the model, for which the host waits.

        Args:
            replay: Runs the model again.
        """
        self.products.pending = self.pending
        return quadratic_model(replay, self.objective, self.directions, self.products)

    def minimum(
        self, model: QuadraticModel, trusted: QuadraticModel, damping: float, *, is_noisy: bool
    ) -> Fit:
        """Return the step at the minimum of the damped model, without a bound on its length.

        Args:
            model: The model.
            trusted: The model with the slopes that are trusted.
            damping: The damping.
            is_noisy: Whether batches differ, so that no descent direction is followed uphill.
        """
        find = trusted.downhill if is_noisy else trusted.minimum
        coefficients = find(damping, self.fixed)
        along = Along.of(model, trusted, coefficients, damping)
        unknown = coefficients[:0] if model.unobserved is None else model.unobserved
        numbers = torch.cat([along, coefficients, unknown]).tolist()
        first, last = len(along), len(along) + len(coefficients)
        own = tuple(numbers[first:last])
        return Fit(self.directions, own, Along(*numbers[:first]), own, tuple(numbers[last:]))


@dataclass(frozen=True)
class SolvedFit:
    """A fit whose coefficients are known, and not the change of the layers' outputs by it.

    Args:
        begun: The fit as it was begun.
        fit: The step before it is bounded.
        change: The change of the layers' outputs by the step; ``None`` for a step that is not
            finite.
        asked: The change, and the inner products by layer if they are asked for.
        products: These inner products.
    """

    begun: PendingFit
    fit: Fit
    change: Tensor | None = None
    asked: Unread | None = None
    products: PendingProducts | None = None
