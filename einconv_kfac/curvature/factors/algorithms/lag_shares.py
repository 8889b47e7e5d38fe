"""The lags of all dimensions, their work, and its division among tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from math import prod

from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    SCATTERED_ELEMENT_COPIES,
    Cost,
)
from einconv_kfac.curvature.factors.chunking import chunk_count
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, grid_size, half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Axis

Group = tuple[Key, ...]
"""Lags whose products have the same left operand."""

Share = tuple[Group, ...]
"""The lags of a task."""

LAG_MAC_PRICE = 1.2
"""Price of a multiplication in products of one block of channels, relative to wide ones."""


def lag_chunks(problem: Problem) -> int:
    """Return the number of chunks of the input: one, where all sums need more memory than it."""
    axes = axes_of(problem)
    regions = sum(prod(len(lag.regions) for lag in key) for key in half_of_lags(axes))
    sums = regions * problem.channels**2 * problem.geometry.groups
    return 1 if sums > problem.inputs else chunk_count(problem, 2.0)


def axes_of(problem: Problem) -> tuple[Axis, ...]:
    """Return at least two dimensions, since the outermost one has a part of its own."""
    axes = problem.geometry.axes
    return axes if len(axes) > 1 else (Axis(1, 1), *axes)


def _border(key: Key) -> int:
    """Return the positions in the regions that are copied."""
    sizes = [[stop - start for start, stop in lag.regions] for lag in key]
    interior = prod(size[lag.interior] for size, lag in zip(sizes[1:], key[1:]))
    return sum(sizes[0]) * (prod(map(sum, sizes[1:])) - interior)


@lru_cache(maxsize=256)
def lag_groups(axes: tuple[Axis, ...]) -> tuple[Group, ...]:
    """Return half of the lags, by the left operand of their products in the interior."""
    return _grouped(half_of_lags(axes))


def _grouped(keys: Iterable[Key]) -> tuple[Group, ...]:
    """Return lags by the left operand of their products in the interior."""
    groups: dict[tuple[object, ...], list[Key]] = {}
    for key in keys:
        groups.setdefault((key[1:], key[0].left), []).append(key)
    return tuple(map(tuple, groups.values()))


@lru_cache(maxsize=1024)
def lag_shares(problem: Problem, count: int) -> tuple[Share, ...]:
    """Divide the lags into shares with about as much work, the largest first.

    Lags with the same left operand are in several shares only if that makes the largest smaller.
    """
    groups = lag_groups(axes_of(problem))
    apart = [(key,) for group in groups for key in group]
    found = [_shares(problem, units, count) for units in (groups, apart)]
    return min(found, key=lambda shares: max(share_seconds(problem, own) for own in shares))


def _shares(problem: Problem, units: Sequence[Group], count: int) -> tuple[Share, ...]:
    """Divide lags that stay together into shares: each goes to the smallest, the largest first."""
    work = {unit: share_seconds(problem, (unit,)) for unit in units}
    shares: list[list[Group]] = [[] for _ in range(count)]
    for unit in sorted(work, key=lambda unit: work[unit], reverse=True):
        min(shares, key=lambda own: sum(work[one] for one in own)).append(unit)
    return tuple(_grouped(chain.from_iterable(own)) for own in shares if own) or ((),)


def share_seconds(problem: Problem, groups: Share) -> float:
    """Return an estimate of the time of some lags, up to the point where tasks wait."""
    cost = lag_cost(problem, groups)
    if lag_chunks(problem) > 1:  # all are written later
        cost = replace(cost, written=0.0)
    else:
        sums = sum(map(_symmetric_sums, chain.from_iterable(groups)))
        halves = problem.geometry.groups * problem.channels**2 * sums / 2
        cost = replace(cost, written=cost.written + halves)
    return cost.work_seconds(problem) + problem.profile.prices.call * cost.calls


def lag_cost(problem: Problem, groups: Sequence[Group]) -> Cost:
    """Return the work of some lags."""
    axes, keys = axes_of(problem), [key for group in groups for key in group]
    channels, grouped = problem.channels, problem.geometry.groups
    samples = problem.batch * grouped
    row = prod(grid_size(axis) for axis in axes[1:])
    rows = sum(key[0].regions[-1][1] - key[0].regions[0][0] for key in keys)
    masks = len(groups) * grid_size(axes[0]) * row
    regions = sum(prod(len(lag.regions) for lag in key) for key in keys)
    strips = 2 * SCATTERED_ELEMENT_COPIES * sum(_border(key) for key in keys)
    price = LAG_MAC_PRICE * problem.matmul_price(channels)
    written = grouped * channels**2 * sum(map(_written, keys))
    products = regions * (1 + BATCHED_MATRIX_CALLS * (grouped - 1))
    return Cost(
        price * rows * row * samples * channels**2,
        channels,
        samples * channels * (masks + strips),
        written,
        (6 + 2 * lag_chunks(problem)) * products + 30 * len(keys),
    )


def _written(key: Key) -> int:
    """Return how many matrices are written, with the transposes."""
    return prod(len(lag.windows) for lag in key) * (1 + any(lag.distance for lag in key))


def _symmetric_sums(key: Key) -> int:
    """Return how many sums of regions are made symmetric: those of the zero lag."""
    return 0 if any(lag.distance for lag in key) else prod(len(lag.regions) for lag in key)
