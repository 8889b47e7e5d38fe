"""Boxes of consecutive lags whose products are computed together, over shared regions.

A correlation of the input with itself gives the products at a range of distances ``k' - k``, if
all of them sum over the same left positions. Some of these positions have no partner inside the
input at some distances; the partner then counts as zero. So the bounds of regions are those of
the windows of left positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd

from einconv_kfac.curvature.factors.indices.lag_pairs import EntryPairs, Ranges, regions_and_windows
from einconv_kfac.geometry import Axis

ALL_LAGS, HALF_OF_LAGS = "all", "half"
POSITIVE_LAGS, ZERO_LAG, NEGATIVE_LAGS = "positive", "zero", "negative"
"""The distances of a `LagRange`; half of them are the zero and the positive ones."""


@dataclass(frozen=True)
class LagRange:
    """Consecutive distances between entries ``k`` of one remainder and others, along one axis.

    Args:
        axis: The dimension.
        entries: The kernel entries ``k``.
        distances: The distances ``k' - k``.
        remainder: Remainder modulo the stride of the positions that ``k`` meets.
        regions: Disjoint ranges of these positions, counted on their grid.
        windows: For each ``k``, the range of regions ``(first, end)`` that its window covers.
    """

    axis: Axis
    entries: range
    distances: range
    remainder: int
    regions: Ranges
    windows: Ranges

    @property
    def interior(self) -> int:
        """Index of the largest region."""
        sizes = [stop - start for start, stop in self.regions]
        return sizes.index(max(sizes))

    def pairs(self, distance: int) -> EntryPairs:
        """Return the pairs of kernel entries at one of the distances."""
        inside = [k for k in self.entries if 0 <= k + distance < self.axis.kernel_size]
        entries = range(inside[0], inside[-1] + 1, self.entries.step)
        windows = tuple(w for k, w in zip(self.entries, self.windows) if k in entries)
        return EntryPairs(distance, entries, windows)

    def needed(self, region: int) -> range:
        """Return the smallest range of all distances at which some pair needs a region."""
        (start, stop), axis = self.regions[region], self.axis
        found = [
            distance
            for k, (first, end) in zip(self.entries, self.windows)
            if first <= region < end
            for distance in _distances_of(axis, k, self.distances)
            if self.partner(stop - 1, distance) >= 0
            and self.partner(start, distance) < axis.input_size
        ]
        return range(min(found), max(found) + 1) if found else range(0)

    def partner(self, position: int, distance: int) -> int:
        """Return the input position at a distance from a position of the grid."""
        return position * self.axis.stride + self.remainder + distance * self.axis.dilation


@lru_cache(maxsize=1024)
def lag_ranges(axis: Axis, which: str) -> tuple[LagRange, ...]:
    """Return the non-empty ranges of lags of ``axis``, one for each remainder.

    >>> [(s.distances, s.regions) for s in lag_ranges(Axis(5, 3, padding=(1, 1)), POSITIVE_LAGS)]
    [(range(1, 3), ((0, 4),))]
    """
    last = axis.kernel_size - 1
    low = {ALL_LAGS: -last, POSITIVE_LAGS: 1, NEGATIVE_LAGS: -last}.get(which, 0)
    high = {ZERO_LAG: 0, NEGATIVE_LAGS: -1}.get(which, last)
    step, distances = axis.stride // gcd(axis.dilation, axis.stride), range(low, high + 1)
    starts = range(min(step, axis.kernel_size))
    found = [_lag_range(axis, range(k, last + 1, step), distances) for k in starts]
    return tuple(lags for lags in found if lags is not None)


def _distances_of(axis: Axis, k: int, distances: range) -> range:
    """Return the distances for which ``k + distance`` is an entry of the kernel."""
    low, high = max(distances.start, -k), min(distances.stop, axis.kernel_size - k)
    return range(low, max(low, high))


def _lag_range(axis: Axis, entries: range, distances: range) -> LagRange | None:
    """Return the range of lags of entries with one remainder, if it has any products."""
    reach = {k: _distances_of(axis, k, distances) for k in entries}
    kept = [k for k in entries if reach[k]]
    if not kept:
        return None
    low, high = min(reach[k].start for k in kept), max(reach[k].stop for k in kept)
    remainder, ranges = 0, []
    for k in kept:
        met, (shift, remainder) = axis.outputs(k), divmod(axis.input_position(k, 0), axis.stride)
        nearest = -(remainder + (reach[k].stop - 1) * axis.dilation)  # partners inside the input
        farthest = axis.input_size - 1 - remainder - reach[k].start * axis.dilation
        start = max(shift + met.start, -(-nearest // axis.stride))
        stop = min(shift + met.stop, farthest // axis.stride + 1)
        ranges.append((start, max(start, stop)))
    regions, windows = regions_and_windows(ranges)
    if not regions:
        return None
    found = range(kept[0], kept[-1] + 1, entries.step)
    return LagRange(axis, found, range(low, high), remainder, regions, windows)


@lru_cache(maxsize=256)
def lag_boxes(
    axes: tuple[Axis, ...], half: bool, fine: bool = False
) -> tuple[tuple[LagRange, ...], ...]:
    """Return boxes of lags, a `LagRange` per dimension, that contain each lag once.

    Args:
        axes: The dimensions.
        half: Whether to leave out each lag that is the negative of another.
        fine: Whether to split distances by their sign, into more boxes with fewer regions.
    """
    d, signs = len(axes), (POSITIVE_LAGS, ZERO_LAG, NEGATIVE_LAGS)
    every = signs if fine else (ALL_LAGS,)
    last = (POSITIVE_LAGS, ZERO_LAG) if fine else (HALF_OF_LAGS,)
    if half:
        kinds = [
            (*(ZERO_LAG,) * j, first, *rest)
            for j in range(d)
            for first in ((POSITIVE_LAGS,) if j < d - 1 else last)
            for rest in product(*[every] * (d - 1 - j))
        ]
    else:
        kinds = list(product(signs, *[every] * (d - 1)))
    return tuple(found for kind in kinds for found in product(*map(lag_ranges, axes, kind)))
