"""The weight gradients that `correlations` calls: one for each region of a box of lags."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from einconv_kfac.curvature.factors.indices.lag_boxes import LagRange, lag_boxes
from einconv_kfac.geometry import Axis

Spans = tuple[LagRange, ...]
Range = tuple[int, int, int]


@dataclass(frozen=True)
class Call:
    """One weight gradient: the correlations of one region of the left positions.

    Args:
        spans: The lags of all dimensions.
        left: The input positions ``(start, stop, step)`` of the region, per dimension.
        right: Those of their partners; some may be padding.
        lags: The number of lags per dimension.
        slot: Where the results belong in an array ``[*r, *lag]``.
        positions: Number of left positions.
        is_interior: Whether the region is the largest.
    """

    spans: Spans
    left: tuple[Range, ...]
    right: tuple[Range, ...]
    lags: tuple[int, ...]
    slot: tuple[int | slice, ...]
    positions: int
    is_interior: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Regions and lags of the spans."""
        regions = (len(span.regions) for span in self.spans)
        return (*regions, *(len(span.distances) for span in self.spans))


@lru_cache(maxsize=256)
def calls(axes: tuple[Axis, ...], half: bool, fine: bool) -> tuple[Call, ...]:
    """Return the calls for the lags of `lag_boxes`."""
    found = []
    for combined in lag_boxes(axes, half, fine):
        interior = tuple(span.interior for span in combined)
        for region in product(*(range(len(span.regions)) for span in combined)):
            needed = [span.needed(r) for span, r in zip(combined, region)]
            if all(needed):
                found.append(_call(combined, region, needed, region == interior))
    return tuple(found)


def _call(combined: Spans, region: tuple[int, ...], needed: list[range], interior: bool) -> Call:
    """Return the call for one region and the distances that are needed of it."""
    edges_of = [span.regions[r] for span, r in zip(combined, region)]
    left = tuple(
        (span.partner(start, 0), span.partner(stop - 1, 0) + 1, span.axis.stride)
        for span, (start, stop) in zip(combined, edges_of)
    )
    right = tuple(
        (span.partner(start, lags[0]), span.partner(stop - 1, lags[-1]) + 1, 1)
        for span, (start, stop), lags in zip(combined, edges_of, needed)
    )
    inside = (
        slice(lags[0] - span.distances[0], lags[-1] - span.distances[0] + 1)
        for span, lags in zip(combined, needed)
    )
    lags = tuple(map(len, needed))
    positions = prod(stop - start for start, stop in edges_of)
    return Call(combined, left, right, lags, (*region, *inside), positions, interior)
