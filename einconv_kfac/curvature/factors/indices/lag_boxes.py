"""Neighbouring lags whose products are computed together, with the regions they share.

A correlation of the input with itself gives the products at a whole range of distances
``k' - k``, if all of them sum over the same left positions. These may reach beyond what a
single distance needs, where the partner of a position is outside of the input and counts as
zero. So only the windows of the left positions cut regions here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from einconv_kfac.curvature.factors.indices.lag_pairs import Pairs, Ranges, cut
from einconv_kfac.geometry import Axis

ALL, POSITIVE, ZERO, NEGATIVE, HALF = "all", "positive", "zero", "negative", "half"
"""Which distances a span has."""


@dataclass(frozen=True)
class Span:
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

    def pairs(self, distance: int) -> Pairs:
        """Return the pairs of kernel entries at one of the distances."""
        inside = [k for k in self.entries if 0 <= k + distance < self.axis.kernel_size]
        entries = range(inside[0], inside[-1] + 1, self.entries.step)
        windows = tuple(w for k, w in zip(self.entries, self.windows) if k in entries)
        return Pairs(distance, entries, windows)

    def needed(self, region: int) -> range:
        """Return the range of distances at which some pair needs a region, maybe empty."""
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
def spans(axis: Axis, which: str) -> tuple[Span, ...]:
    """Return the spans of ``axis``, one for each remainder, which have any products.

    >>> [(s.distances, s.regions) for s in spans(Axis(5, 3, padding=(1, 1)), POSITIVE)]
    [(range(1, 3), ((0, 4),))]
    """
    last = axis.kernel_size - 1
    low = {ALL: -last, POSITIVE: 1, NEGATIVE: -last}.get(which, 0)
    high = {ZERO: 0, NEGATIVE: -1}.get(which, last)
    step = len({k * axis.dilation % axis.stride for k in range(axis.stride)})
    found = [_span(axis, range(k, last + 1, step), range(low, high + 1)) for k in range(step)]
    return tuple(span for span in found if span is not None)


def _distances_of(axis: Axis, k: int, distances: range) -> range:
    """Return which of the distances lead from ``k`` to an entry of the kernel."""
    low, high = max(distances.start, -k), min(distances.stop, axis.kernel_size - k)
    return range(low, max(low, high))


def _span(axis: Axis, entries: range, distances: range) -> Span | None:
    """Return the span of entries with one remainder, if it has any products."""
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
    regions, windows = cut(ranges)
    if not regions:
        return None
    found = range(kept[0], kept[-1] + 1, entries.step)
    return Span(axis, found, range(low, high), remainder, regions, windows)


@lru_cache(maxsize=256)
def spans_of_all(
    axes: tuple[Axis, ...], half: bool, fine: bool = False
) -> tuple[tuple[Span, ...], ...]:
    """Return the spans of all dimensions together, which cover each lag once.

    Args:
        axes: The dimensions.
        half: Whether to leave out lags that are the mirror image of another.
        fine: Whether to part distances by their sign: more spans, with fewer regions.
    """
    d, signs = len(axes), (POSITIVE, ZERO, NEGATIVE)
    every = signs if fine else (ALL,)
    last = (POSITIVE, ZERO) if fine else (HALF,)
    if half:
        kinds = [
            (*(ZERO,) * j, first, *rest)
            for j in range(d)
            for first in ((POSITIVE,) if j < d - 1 else last)
            for rest in product(*[every] * (d - 1 - j))
        ]
    else:
        kinds = list(product(signs, *[every] * (d - 1)))
    return tuple(found for kind in kinds for found in product(*map(spans, axes, kind)))
