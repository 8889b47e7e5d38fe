"""The choice of the algorithm for a factor: the cheapest by its estimated time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from einconv_kfac.curvature.arguments import choice
from einconv_kfac.curvature.factors import algorithms
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.division import division_of
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.type_registry import defined_classes
from einconv_kfac.geometry import Padding, Sizes, conv_geometry


def built_in_algorithms() -> dict[str, Algorithm]:
    """Return the algorithms that the files of ``algorithms/`` define, by name."""
    classes: list[type[Algorithm]] = defined_classes(algorithms, Algorithm)
    return {cls.name: cls() for cls in sorted(classes, key=lambda cls: cls.rank)}


ALGORITHMS = built_in_algorithms()


def applicable(problem: Problem) -> tuple[str, ...]:
    """Return the names of the algorithms that can compute the problem's factor."""
    return tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.applies(problem))


def seconds(cost: Cost, problem: Problem) -> float:
    """Return an estimate of a cost's time, to be compared with others of the same problem only."""
    return cost.work_seconds(problem) + problem.profile.prices.call * cost.calls


@lru_cache(maxsize=1024)
def choose(problem: Problem) -> str:
    """Return the name of the cheapest algorithm."""
    names = [name for name in applicable(problem) if ALGORITHMS[name].is_measured]
    fastest = [name for name in names if ALGORITHMS[name].is_always_fastest]
    return min(fastest or names, key=lambda name: division_of(problem, ALGORITHMS[name]).seconds)


def algorithm_of(problem: Problem, name: str | None) -> Algorithm:
    """Return the algorithm of that name, or the cheapest.

    Raises:
        ValueError: If there is no such algorithm, or if it cannot compute the factor.
    """
    if name is None:
        return ALGORITHMS[choose(problem)]
    return ALGORITHMS[choice("algorithm", name, applicable(problem))]


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
