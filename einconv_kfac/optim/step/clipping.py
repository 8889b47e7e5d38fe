"""Bounds on the size of a step with fixed rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from einconv_kfac.optim.vectors import Direction, inner


def kl_clip_factor(
    direction: Direction, gradient: Direction, rates: Mapping[str, float], bound: float
) -> Tensor:
    """Return the factor, at most 1, that keeps ``sum lr^2 d.g`` at most at the bound.

    For the direction ``d`` and gradient ``g``, that sum approximates twice the
    Kullback-Leibler divergence of the model after the step from the model before it.
    """
    return _factor((direction, gradient), rates, bound)


def norm_factor(direction: Direction, rates: Mapping[str, float], bound: float) -> Tensor:
    """Return the factor, at most 1, that keeps the Euclidean norm of ``lr d`` within the bound."""
    return _factor((direction, direction), rates, bound**2)


def _factor(pair: tuple[Direction, Direction], rates: Mapping[str, float], bound: float) -> Tensor:
    """Return the square root, at most 1, of a bound by ``sum lr^2 a.b``."""
    size = inner(*pair, {name: rate**2 for name, rate in rates.items()})
    inverse = size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt()
    return (inverse * math.sqrt(bound)).clamp_max(1.0)
