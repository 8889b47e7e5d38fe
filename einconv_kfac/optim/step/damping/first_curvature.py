"""The curvature that the first damping follows from."""

from __future__ import annotations

import math

import torch

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.quadratic_model import quadratic_model
from einconv_kfac.optim.vectors import Direction, entries

LARGEST_PROMISE = 100.0
"""Largest reduction along the first gradient that is believed, as a multiple of the objective. A
loss that is never negative cannot fall by more than itself."""
_LARGEST_EXPONENT = 120


def first_curvature(replay: Replay, objective: Objective) -> float | None:
    """Return the curvature along the gradient ``g``, or ``None`` if the gradient is zero.

    It is ``c = g.(G + W).g / g.g``. Where outputs are saturated, as with inputs of very different
    sizes, ``G`` nearly vanishes though the gradient is large, and the reduction ``g.g / (2 c)``
    that the quadratic model promises exceeds the objective ``f`` by orders of magnitude. Then
    it is ``g.g / (2 f)``, with which the model promises ``f`` (Polyak, 1987). An objective that is
    negative has no such bound; without any curvature its size is the only scale, and counts.

    Args:
        replay: Runs the model again.
        objective: The objective, of at least one batch.

    Raises:
        RuntimeError: If it is not positive.
    """
    exponent = _exponent(objective.gradient)
    if exponent is None:
        return None
    direction = {name: g * 2.0**-exponent for name, g in objective.gradient.items()}  # exact
    model = quadratic_model(replay, objective, [direction])
    curvature = float(model.curvature / model.gram)
    value, square = float(objective.value()), float(model.gram) * 4.0**exponent
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


def _exponent(gradient: Direction) -> int | None:
    """Return the exponent of the largest entry, by which squares stay in range; ``None`` for 0."""
    largest = [entries(g).abs().amax().double() for g in gradient.values() if g.numel()]
    found = float(torch.stack(largest).amax()) if largest else 0.0
    if not found:
        return None
    return min(max(math.frexp(found)[1], -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
