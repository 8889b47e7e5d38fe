"""The curvature that the first damping follows from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.fits.quadratic_model import PendingModel, Products, quadratic_model
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.vectors import Direction, entries, precise

LARGEST_PROMISE = 100.0
"""Largest reduction along the first gradient that is believed, as a multiple of the objective. A
loss that is never negative cannot fall by more than itself."""
_LARGEST_EXPONENT = 120


class FirstCurvature:
    """The curvature along the gradient ``g``, which the device was asked for.

    It is ``c = g.(G + W).g / g.g``. Where outputs are saturated, as with inputs of very different
    sizes, ``G`` nearly vanishes though the gradient is large, and the reduction ``g.g / (2 c)``
    that the quadratic model promises exceeds the objective ``f`` by orders of magnitude. Then
    it is ``g.g / (2 f)``, with which the model promises ``f`` (Polyak, 1987). An objective that is
    negative has no such bound; without any curvature its size is the only scale, and counts.

    Args:
        replay: Runs the model again.
        objective: The objective, of at least one batch.
    """

    def __init__(self, replay: Replay, objective: Objective) -> None:
        self._replay, self._objective = replay, objective
        largest = _largest(objective.gradient)
        exponent = torch.frexp(largest).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        scale = torch.exp2(-exponent.double())  # a power of 2, by which squares stay in range
        self._numbers = Unread(largest, scale)
        self._direction = _scaled(objective.gradient, scale)
        self._products = Products(replay, objective)
        if self._numbers.is_late:
            self._ask_()

    def _ask_(self) -> None:
        """Ask for the quadratic model along the gradient."""
        own = self._objective, [self._direction], self._products
        self._products.pending = PendingModel(*own)

    def read(self, value: float) -> float | None:
        """Return the curvature, or ``None`` if the gradient is zero.

        Args:
            value: The objective ``f``.

        Raises:
            RuntimeError: If it is not positive.
        """
        (largest,), (scale,) = self._numbers.read()
        if not largest:
            return None
        own = self._replay, self._objective, [self._direction], self._products
        model = quadratic_model(*own)
        curvature = float(model.curvature / model.gram)
        square = float(model.gram) / scale**2
        if (value > 0 and 2 * LARGEST_PROMISE * value * curvature < square) or (
            value < 0 and curvature == 0
        ):
            curvature = square / (2 * abs(value))
        if not 0 < curvature < math.inf:
            raise RuntimeError(
                "The first `damping` follows from the curvature along the gradient, which must be "
                f"positive, got {curvature}. Pass `damping`."
            )
        return curvature


def _largest(gradient: Direction) -> Tensor:
    """Return the largest absolute value of an entry, in float64."""
    largest = [entries(g).abs().amax().double() for g in gradient.values() if g.numel()]
    return torch.stack(largest).amax() if largest else torch.zeros((), dtype=torch.float64)


def _scaled(gradient: Direction, scale: Tensor) -> Direction:
    """Return a gradient times a power of 2, which is exact."""
    own = [(name, g, g.to(precise(g.dtype))) for name, g in gradient.items()]
    return {name: (wide * scale.to(wide.real.dtype)).to(g.dtype) for name, g, wide in own}
