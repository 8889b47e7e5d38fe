"""The coefficients of the last fit, which the steps until the next one share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from einconv_kfac.optim.replay.joint import joined
from einconv_kfac.optim.state_schema import COUNT, FINITE, NUMBER, Listed, Maybe, Record
from einconv_kfac.optim.step.fits.fit import Along, Fit
from einconv_kfac.optim.step.momentum.layer_products import PendingProducts, pending_products
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, combination

LARGEST_GROWTH = 4.0
"""Growth of the slope along the mix, relative to the last fit, above which coefficients are fitted
anew: the gradients are then of another size, as after a change of the loss or its weight."""
LARGEST_CLOSE_GROWTH = 2.0
"""The same where batches agree. Growth is then not one of noise but of the objective, as where a
softmax is about to leave saturation, and its curvature grows as much."""
LARGEST_SHARE = 2.0
"""Factor between the sizes of two batches above which coefficients are fitted anew."""


@dataclass(frozen=True)
class CarriedMix:
    """A mix of the descent directions of a batch with the coefficients of an earlier fit.

    Args:
        direction: The mix.
        products: Its inner products by layer.
        change: The change of the layers' outputs by it, if it is likely to be needed.
    """

    direction: Direction
    products: PendingProducts
    change: Tensor | None = None

    @property
    def numbers(self) -> Tensor:
        """The numbers of `products`, and the change after them."""
        own = self.products.numbers
        return own if self.change is None else torch.cat([own, self.change.to(own).reshape(1)])


class CarriedFit:
    """What is carried from a fit to the steps until the next.

    With the coefficients ``c`` of the last fit, the slope ``b`` and the damped curvature ``Q``,
    the curvature ratio is ``r = c.(Q c) / -(b.c)``. It is dimensionless, and 1 if the inverses
    were those of the exact curvature along the step and ``c`` were 1. The curvature along a later
    mix ``v`` of directions is taken to be ``r`` times ``-g.v``, so that the minimum of the
    quadratic model, with the slope times the trust, is ``trust / r`` times the mix.

    Attributes:
        mix: The coefficients of the descent directions; empty before the first fit.
    """

    def __init__(self) -> None:
        self.mix: tuple[float, ...] = ()
        self._ratio = self._slope = 0.0
        self._kind: int | None = None
        self._size = 0
        self._kinds = ObjectiveKinds()

    def keep_(self, objective: Objective, mix: Sequence[float], slope: float, bend: float) -> None:
        """Keep a fit.

        Args:
            objective: The objective.
            mix: The coefficients of the descent directions.
            slope: ``b.c``, of the batch.
            bend: ``c.(Q c)``.
        """
        self.mix, self._slope = tuple(mix), slope
        self._ratio = -bend / slope if slope else 0.0
        self._kind, self._size = self._kinds.of(objective)

    def mixed(
        self,
        objective: Objective,
        directions: Sequence[Direction],
        factor: float,
        followed: Direction,
    ) -> CarriedMix | None:
        """Return the mix with the kept coefficients, or ``None`` where the objective is another.

        Args:
            objective: The objective.
            directions: The descent directions, divided by a factor.
            factor: The factor, 1 or -1.
            followed: The slow momentum, times learning rates.
        """
        if not self._is_for(objective, len(directions)):
            return None
        coefficients = [factor * coefficient for coefficient in self.mix]
        mixed = combination(objective.parameters, coefficients, directions)
        point = objective.parameters, objective.gradient
        return CarriedMix(mixed, pending_products(point, followed, mixed))

    def fit(
        self, mix: CarriedMix, numbers: Sequence[float], trust: float, *, is_noisy: bool
    ) -> Fit | None:
        """Return the step along a mix, or ``None`` where the coefficients do not hold.

        Args:
            mix: The mix.
            numbers: Its `CarriedMix.numbers` on the host.
            trust: The fraction of the slope that later batches confirm.
            is_noisy: Whether batches differ, and their slopes.
        """
        products = mix.products.of(numbers)
        slope = sum(own.own for own in products.values())
        square = sum(own.update for own in products.values())
        growth = LARGEST_GROWTH if is_noisy else LARGEST_CLOSE_GROWTH
        if not (growth * self._slope <= slope < 0 and square < math.inf):
            return None
        along = Along(slope, trust * slope, -self._ratio * slope, square)
        whole = Fit([mix.direction], (1.0,), along, self.mix, products=products, is_carried=True)
        return whole.scaled(trust / self._ratio)

    @property
    def factor(self) -> float:
        """The step along a mix, as a multiple of the trust times the mix, as in `fit`."""
        return 1 / self._ratio

    def _is_for(self, objective: Objective, count: int) -> bool:
        """Return whether the coefficients hold for an objective with a number of directions."""
        if not (len(self.mix) == count and self._slope < 0 and 0 < self._ratio < math.inf):
            return False
        kind, size = self._kinds.of(objective)
        is_alike = size <= LARGEST_SHARE * self._size and self._size <= LARGEST_SHARE * size
        return is_alike and kind == self._kind

    schema = Record(
        {
            "mix": Listed(FINITE),
            "ratio": NUMBER,
            "slope": NUMBER,
            "kind": Maybe(COUNT),
            "size": COUNT,
        }
    )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        return {
            "mix": list(self.mix),
            "ratio": self._ratio,
            "slope": self._slope,
            "kind": self._kind,
            "size": self._size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.mix = tuple(state["mix"])
        self._ratio, self._slope = state["ratio"], state["slope"]
        self._kind, self._size = state["kind"], state["size"]


class ObjectiveKinds:
    """Numbers that are the same for objectives with the same parts.

    These are the parameters, their relative learning rates and weight decays, and the losses. The
    number is computed again only where one of them may have changed.
    """

    def __init__(self) -> None:
        self._settings: object = None
        self._parts: object = None
        self._kind = 0

    def of(self, objective: Objective) -> tuple[int, int]:
        """Return the number of an objective, and the number of entries of all its outputs."""
        batches = joined(objective.batches)
        losses = [(type(b.loss_model).__name__, len(b.outputs), b.parameters) for b in batches]
        parts = [*objective.parameters], losses
        if self._settings is not objective.by_parameter or self._parts != parts:
            self._settings, self._parts = objective.by_parameter, parts
            self._kind = _kind_of(objective, losses)
        return self._kind, sum(output.numel() for b in batches for output in b.outputs)


def _kind_of(objective: Objective, losses: Sequence[object]) -> int:
    """Return a checksum of the parts of an objective."""
    largest = max(objective.rates.values()) or 1.0
    rates = [rate / largest for rate in objective.rates.values()]
    parts = [*objective.rates], rates, [*objective.decay.values()], losses
    return crc32(repr(parts).encode())
