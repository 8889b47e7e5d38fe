"""Cells of positions that are summed before the product with the windows, on their whole domain."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from factor_definition import columns
from hypothesis import given
from hypothesis import strategies as st
from test_factor_algorithms import DRAWN, TOLERANCE, draw_input

from einconv_kfac.curvature.factors.indices import runs
from einconv_kfac.curvature.factors.indices.runs import met_entries, partition_by_runs, partitions
from einconv_kfac.curvature.factors.reduce import window_sums
from einconv_kfac.geometry import Axis, Geometry

LONGEST = (300, 40, 16)


@st.composite
def long_axes(draw: st.DrawFn, longest: int) -> Axis:
    """Draw one dimension that has an interior."""
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    sides = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    least = (kernel - 1) * dilation + 1
    size = draw(st.integers(least, max(least, longest)))
    return Axis(size, kernel, draw(st.integers(1, 4)), sides, dilation)


@st.composite
def long_geometries(draw: st.DrawFn) -> Geometry:
    """Draw a convolution of one to three dimensions."""
    longest = LONGEST[(ndim := draw(st.integers(1, 3))) - 1]
    return Geometry(tuple(draw(long_axes(longest)) for _ in range(ndim)))


@given(long_axes(300), st.booleans(), st.booleans())
@DRAWN
def test_cells_contain_every_met_position_once(
    axis: Axis, transposed: bool, innermost: bool
) -> None:
    met = met_entries(axis, transposed)
    found = partition_by_runs(axis, transposed, innermost)
    cells = [range(run.start + i, run.stop, run.period) for run in found.runs for i in run.kept]
    for cell, entries in zip(cells, found.entries, strict=True):
        assert {met[i] for i in cell} == {entries}
    held = sorted(i for cell in cells for i in cell)
    assert all(a < b for a, b in pairwise(held))
    assert {i for i, entries in enumerate(met) if entries} <= set(held)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "subclass"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("largest", [0, runs.SHARED_MATRIX_ELEMENTS])
def test_sums_over_runs(layout: str, transposed: bool, largest: int) -> None:
    """Every axis is summed wherever it has a run, even where that is not cheaper."""

    @given(long_geometries())
    @DRAWN
    def check(geometry: Geometry) -> None:
        sizes = geometry.output_size if transposed else geometry.input_size
        x = draw_input(Geometry(tuple(Axis(size, 1) for size in sizes)), 2, 3)
        a = columns(x, geometry, transposed=transposed).sum(-1).flatten(1)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels last" else x
        x = x.mT.contiguous().mT if layout == "strided" and geometry.ndim > 1 else x
        x = torch.nn.Parameter(x) if layout == "subclass" else x
        with torch.no_grad():
            got = window_sums(x, geometry, torch.float64, transposed)
        torch.testing.assert_close(got, a, **TOLERANCE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CALL_NANOSECONDS", 0.0)
        patch.setattr(runs, "_product", lambda _: 1e6)
        patch.setattr(runs, "SHARED_MATRIX_ELEMENTS", largest)
        for cache in (runs.partitions, runs.incidence_matrices, runs.shares_one_product):
            cache.cache_clear()
        check()
    for cache in (runs.partitions, runs.incidence_matrices, runs.shares_one_product):
        cache.cache_clear()


def test_large_images_are_summed_and_small_ones_multiplied() -> None:
    (large, last) = partitions((Axis(56, 3, 1, (1, 1)),) * 2, False, 512)
    assert [(run.start, run.stop) for run in large.runs] == [(0, 1), (1, 55), (55, 56)]
    assert last.is_finest
    assert all(axis.is_finest for axis in partitions((Axis(7, 3, 1, (1, 1)),) * 2, False, 4096))
    assert prod(len(axis.entries) for axis in (large, last)) == 3 * 56
