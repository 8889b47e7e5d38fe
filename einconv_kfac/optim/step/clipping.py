"""Bounds on the size of a step with fixed rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, inner, sum_of

Rates: TypeAlias = Mapping[str, float | Tensor]
"""Learning rates by parameter name, of which some may be on the device."""


def clip_(direction: Direction, objective: Objective) -> Tensor:
    """Clip a direction in place, and return the factor."""
    settings = objective.settings
    kl_bound, norm_bound = settings.kl_bound(), settings.norm_bound()
    if not direction or (kl_bound is None and norm_bound is None):
        return torch.ones(())
    rates: dict[str, float | Tensor] = {**objective.rates, **objective.rate_tensors}
    factors = []
    if kl_bound is not None:
        factors.append(kl_clip_factor(direction, objective.gradient, rates, kl_bound))
    if norm_bound is not None:
        factors.append(norm_factor(direction, rates, norm_bound))
    factor = factors[0] if len(factors) == 1 else factors[0].minimum(factors[1])
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in direction.values():
        alike[tensor.dtype].append(tensor)
    for tensors in alike.values():
        torch._foreach_mul_(tensors, factor.to(tensors[0]))
    return factor


def kl_clip_factor(direction: Direction, gradient: Direction, rates: Rates, bound: float) -> Tensor:
    """Return the factor, at most 1, that keeps ``sum lr^2 d.g`` at most at the bound.

    For the direction ``d`` and gradient ``g``, that sum approximates twice the
    Kullback-Leibler divergence of the model after the step from the model before it.
    """
    return _factor((direction, gradient), rates, bound)


def norm_factor(direction: Direction, rates: Rates, bound: float) -> Tensor:
    """Return the factor, at most 1, that keeps the Euclidean norm of ``lr d`` within the bound."""
    return _factor((direction, direction), rates, bound**2)


def _factor(pair: tuple[Direction, Direction], rates: Rates, bound: float) -> Tensor:
    """Return the square root, at most 1, of a bound by ``sum lr^2 a.b``."""
    numbers = {n: rate**2 for n, rate in rates.items() if not isinstance(rate, Tensor)}
    sizes = []
    if any(name in numbers for name in pair[0]) or not pair[0]:
        a, b = ({n: d for n, d in own.items() if n in numbers} for own in pair)
        sizes.append(inner(a, b, numbers))
    tensors = {n: rate for n, rate in rates.items() if isinstance(rate, Tensor)}
    for rate in {id(own): own for own in tensors.values()}.values():
        a, b = ({n: d for n, d in own.items() if tensors.get(n) is rate} for own in pair)
        if a:
            sizes.append(inner(a, b) * rate.double().square())
    size = sum_of(sizes)
    inverse = size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt()
    return (inverse * math.sqrt(bound)).clamp_max(1.0)
