"""Which algorithm computes a factor: the cheapest by its counts, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.algorithms.bands import banded, banded_cost
from einconv_kfac.curvature.factors.algorithms.correlations import correlated, correlated_cost
from einconv_kfac.curvature.factors.algorithms.grams import LARGEST, gram, gram_cost
from einconv_kfac.curvature.factors.algorithms.im2col import im2col, im2col_cost
from einconv_kfac.curvature.factors.algorithms.lags import lag_reuse, lag_reuse_cost
from einconv_kfac.curvature.factors.algorithms.pointwise import pointwise, pointwise_cost
from einconv_kfac.curvature.factors.algorithms.rows import by_rows, rows_cost
from einconv_kfac.curvature.factors.problem import Cost, Problem
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Padding, Sizes, conv_geometry


@dataclass(frozen=True)
class Algorithm:
    """A way to add ``sum_{n,o} a a^T`` to an update, and what it does."""

    add: Callable[[Tensor, Problem, Update], None]
    cost: Callable[[Problem], Cost]


ALGORITHMS = {
    "lags": Algorithm(lag_reuse, lag_reuse_cost),
    "correlations": Algorithm(correlated, correlated_cost),
    "bands": Algorithm(banded, banded_cost),
    "rows": Algorithm(by_rows, rows_cost),
    "grams": Algorithm(gram, gram_cost),
    "im2col": Algorithm(im2col, im2col_cost),
    "pointwise": Algorithm(pointwise, pointwise_cost),
}

PRICES = {
    "cpu": Cost(9.2e-12, 0.0, 0.56e-9, 1.5e-9, 1.8e-6),
    "cuda": Cost(4e-14, 64.0, 4e-12, 4e-12, 1e-5),
}
"""Seconds per unit; ``width`` is that of products which reach half of the full speed.

Those of a CPU are a fit to the layers of benchmarks/factors.py on one core, with products by
oneDNN; what matters is their ratio. Those of a GPU follow from data sheets.
"""


def applicable(problem: Problem) -> tuple[str, ...]:
    """Return the names of the algorithms that can compute the problem's factor.

    Correlations are left to CPUs: on a GPU the routine may round to TF32, and add in any order.
    So are products of rows, which few calls are made for.
    Gram matrices are left to tiny images: their memory grows with the square of the positions.
    """
    single = all(axis.kernel_size == 1 for axis in problem.geometry.axes)
    unknown = {"pointwise"} if not single else set()
    if problem.device != "cpu" or problem.geometry.ndim > 3:
        unknown.add("correlations")
    if problem.device != "cpu" or problem.geometry.ndim > 2 or problem.geometry.groups > 1:
        unknown.add("rows")
    if problem.channels * prod(problem.geometry.input_size) > LARGEST:
        unknown.add("grams")
    return tuple(name for name in ALGORITHMS if name not in unknown)


def seconds(cost: Cost, problem: Problem) -> float:
    """Estimate how long a cost takes; comparable for one problem, and no more than that."""
    price = PRICES.get(problem.device, PRICES["cuda"])
    slow = 1 + price.width / cost.width
    double = 2.0 if problem.dtype == torch.float64 else 1.0
    return (
        price.macs * cost.macs * slow + price.copied * cost.copied + price.written * cost.written
    ) * double + price.calls * cost.calls


@lru_cache(maxsize=1024)
def choose(problem: Problem) -> str:
    """Return the name of the cheapest algorithm."""
    names = applicable(problem)
    if "pointwise" in names:
        return "pointwise"
    return min(names, key=lambda name: seconds(ALGORITHMS[name].cost(problem), problem))


def algorithm_of(problem: Problem, name: str | None) -> Algorithm:
    """Return the algorithm of that name, or the cheapest.

    Raises:
        ValueError: If there is no such algorithm, or if it cannot compute the factor.
    """
    name = choose(problem) if name is None else name
    if name not in applicable(problem):
        raise ValueError(f"`algorithm` must be one of {applicable(problem)}, got {name!r}.")
    return ALGORITHMS[name]


def explain(
    input_shape: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> str:
    """Return a table of the algorithms for a convolution's expand factor, cheapest first.

    Args:
        input_shape: Shape ``[N, C, *i]`` of the input.
        kernel_size: As in torch, like the hyper-parameters that follow.
        stride: As in torch.
        padding: As in torch, or ``(left, right)`` for each dimension.
        dilation: As in torch.
        groups: As in torch.
        dtype: Dtype of the input.
        device: Type of its device.

    Raises:
        ValueError: If the hyper-parameters do not fit.

    >>> print(explain((32, 64, 56, 56), 1))  # doctest: +ELLIPSIS
    algorithm           GMAC    copied    written    calls  estimate
    pointwise...
    """
    geometry = conv_geometry(input_shape[2:], kernel_size, stride, padding, dilation, groups)
    channels = geometry.split_channels(input_shape[1])
    problem = Problem(geometry, input_shape[0], channels, dtype, device)
    costs = {name: ALGORITHMS[name].cost(problem) for name in applicable(problem)}
    estimates = {name: seconds(cost, problem) for name, cost in costs.items()}
    lines = ["algorithm           GMAC    copied    written    calls  estimate"]
    for name in sorted(costs, key=lambda name: (name != choose(problem), estimates[name])):
        cost = costs[name]
        lines.append(
            f"{name:13} {cost.macs / 1e9:10.3f} {cost.copied:9.2e}  {cost.written:9.2e} "
            f"{cost.calls:8.0f} {1e3 * estimates[name]:7.2f} ms"
        )
    return "\n".join(lines)
