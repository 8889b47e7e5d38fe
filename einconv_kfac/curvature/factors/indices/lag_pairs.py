"""The products of input positions that each entry of a factor sums, along one axis.

Kernel entry ``k`` meets position ``o S + k D - left`` for output ``o``. So the entry of the
factor at ``(k, k')`` sums products of positions with the distance ``(k' - k) D``. The window of
these positions depends on ``k`` at the borders only. Entries with the same distance ``k' - k``
whose positions have the same remainder modulo ``S`` share all products but those at the borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import gcd

from einconv_kfac.geometry import Axis

Ranges = tuple[tuple[int, int], ...]
"""Ranges ``(start, stop)``."""


@dataclass(frozen=True)
class EntryPairs:
    """The pairs ``(k, k + distance)`` of kernel entries whose ``k`` has one remainder.

    Args:
        distance: ``k' - k``.
        entries: The kernel entries ``k``.
        windows: For each ``k``, the range of regions ``(first, end)`` that its window covers.
    """

    distance: int
    entries: range
    windows: Ranges


@dataclass(frozen=True)
class Lag(EntryPairs):
    """Pairs of kernel entries, and the positions that they meet.

    Positions are counted on grids that hold every ``S``-th position of the input: position
    ``t`` of the grid with remainder ``r`` is input position ``t S + r``.

    Args:
        distance: See `EntryPairs`, as for the two arguments that follow.
        entries: See `EntryPairs`.
        windows: See `EntryPairs`.
        left: Remainder of the positions that ``k`` meets.
        right: Remainder of the positions that ``k'`` meets.
        shift: Grid position met by ``k'`` minus the one met by ``k``.
        regions: Disjoint ranges ``(start, stop)`` of the left grid, in increasing order.
    """

    left: int
    right: int
    shift: int
    regions: Ranges

    @property
    def interior(self) -> int:
        """Index of the largest region."""
        sizes = [stop - start for start, stop in self.regions]
        return sizes.index(max(sizes))


Key = tuple[Lag, ...]
"""The lags of all dimensions together."""


@lru_cache(maxsize=1024)
def lags(axis: Axis) -> tuple[Lag, ...]:
    """Return all lags of ``axis`` with at least one product, by distance.

    >>> [(lag.distance, lag.regions) for lag in lags(Axis(5, 2, padding=(1, 1)))]
    [(-1, ((1, 5),)), (0, ((0, 5),)), (1, ((0, 4),))]
    """
    size = axis.kernel_size
    found = []
    for distance in range(1 - size, size):
        first, last = max(0, -distance), min(size, size - distance)
        step = axis.stride // gcd(axis.dilation, axis.stride)
        for start in range(first, min(last, first + step)):
            found.append(_lag(axis, distance, range(start, last, step)))
    return tuple(lag for lag in found if lag.regions)


@lru_cache(maxsize=256)
def all_lags(axes: tuple[Axis, ...]) -> tuple[Key, ...]:
    """Return the lags of all axes together, ordered so that those with equal masks are adjacent."""
    found = product(*(lags(axis) for axis in (*axes[1:], axes[0])))
    return tuple((key[-1], *key[:-1]) for key in found)


@lru_cache(maxsize=256)
def half_of_lags(axes: tuple[Axis, ...]) -> tuple[Key, ...]:
    """Return the zero lag and one of each pair of opposite lags."""
    zero = (0,) * len(axes)
    return tuple(k for k in all_lags(axes) if tuple(lag.distance for lag in k) >= zero)


def grid_size(axis: Axis) -> int:
    """Return the number of positions of a grid, the same for all remainders."""
    return -(-axis.input_size // axis.stride)


def _lag(axis: Axis, distance: int, entries: range) -> Lag:
    """Return the lag of the pairs ``(k, k + distance)`` for ``k`` in ``entries``."""
    shifts, remainders = zip(*(divmod(axis.input_position(k, 0), axis.stride) for k in entries))
    shift, right = divmod(axis.input_position(entries[0] + distance, 0), axis.stride)
    ranges = []
    for k, start in zip(entries, shifts):
        here, there = axis.outputs(k), axis.outputs(k + distance)
        low, high = max(here.start, there.start), min(here.stop, there.stop)
        ranges.append((start + low, start + max(low, high)))
    regions, windows = regions_and_windows(ranges)
    return Lag(distance, entries, windows, remainders[0], right, shift - shifts[0], regions)


def regions_and_windows(ranges: list[tuple[int, int]]) -> tuple[Ranges, Ranges]:
    """Cut ranges of positions into disjoint regions.

    Returns:
        The regions ``(start, stop)``, in increasing order, and for each of the ``ranges`` the
        regions ``(first, end)`` that it consists of.
    """
    filled = [window for window in ranges if window[0] < window[1]]
    edges = sorted({edge for window in filled for edge in window})
    regions = [
        (low, high)
        for low, high in pairwise(edges)
        if any(start <= low and high <= stop for start, stop in filled)
    ]
    return tuple(regions), tuple(_covered(regions, window) for window in ranges)


def _covered(regions: list[tuple[int, int]], window: tuple[int, int]) -> tuple[int, int]:
    """Return the range of the ``regions`` inside the window."""
    inside = [
        i for i, (start, stop) in enumerate(regions) if window[0] <= start and stop <= window[1]
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
