"""Cells of positions that are summed before the product with the windows, on their whole domain."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from math import prod

import pytest
import torch
from factor_definition import columns
from hypothesis import given
from hypothesis import strategies as st
from test_factor_algorithms import DRAWN, TOLERANCE, draw_input
from torch.nn.functional import conv_transpose2d

from einconv_kfac.curvature.factors import conv_input_factor, conv_transpose_input_factor
from einconv_kfac.curvature.factors.algorithms.rows import _widths
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


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield an input ``[n, c, *i]`` in each layout in memory, and as a parameter."""
    yield "contiguous", x
    yield "channels last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    if x.ndim > 3:
        yield "strided", x.mT.contiguous().mT
    yield "subclass", torch.nn.Parameter(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("largest", [0, runs.SHARED_MATRIX_ELEMENTS])
def test_sums_over_runs(transposed: bool, largest: int) -> None:
    """Every axis is summed wherever it has a run, even where that is not cheaper."""

    @given(long_geometries())
    @DRAWN
    def check(geometry: Geometry) -> None:
        sizes = geometry.output_size if transposed else geometry.input_size
        contiguous = draw_input(Geometry(tuple(Axis(size, 1) for size in sizes)), 2, 3)
        a = columns(contiguous, geometry, transposed=transposed).sum(-1).flatten(1)
        for layout, x in layouts(contiguous):
            with torch.no_grad():
                got = window_sums(x, geometry, torch.float64, transposed)
            torch.testing.assert_close(got, a, **TOLERANCE, msg=partial("{}: {}".format, layout))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CALL_NANOSECONDS", 0.0)
        patch.setattr(runs, "_product", lambda _: 1e6)
        patch.setattr(runs, "SHARED_MATRIX_ELEMENTS", largest)
        for cache in (runs.partitions, runs.incidence_matrices, runs.shares_one_product):
            cache.cache_clear()
        check()
    for cache in (runs.partitions, runs.incidence_matrices, runs.shares_one_product):
        cache.cache_clear()


@pytest.mark.parametrize(("size", "kernel", "padding"), [(41, 3, 20), (42, 4, 20)])
def test_an_image_of_padding_beside_a_few_positions(size: int, kernel: int, padding: int) -> None:
    """Runs that no window meets are left out, and the only one that remains is no whole axis."""
    x = torch.randn(8, 16, size, size, generator=torch.Generator().manual_seed(0)).double()
    identity = torch.eye(kernel**2, dtype=torch.float64).unflatten(1, (1, kernel, kernel))
    images = x.flatten(0, 1).unsqueeze(1).expand(-1, kernel**2, -1, -1)
    shifted = conv_transpose2d(images, identity, padding=padding, groups=kernel**2)
    rows = shifted.mean((2, 3)).reshape(8, -1)  # n (c *k)
    got = conv_transpose_input_factor(
        x, kernel_size=kernel, padding=padding, approximation="reduce"
    )
    torch.testing.assert_close(got[0], rows.T @ rows / 8, **TOLERANCE)


def test_large_images_are_summed_and_small_ones_multiplied() -> None:
    (large, last) = partitions((Axis(56, 3, 1, (1, 1)),) * 2, False, 512)
    assert [(run.start, run.stop) for run in large.runs] == [(0, 1), (1, 55), (55, 56)]
    assert last.is_finest
    assert all(axis.is_finest for axis in partitions((Axis(7, 3, 1, (1, 1)),) * 2, False, 4096))
    assert prod(len(axis.entries) for axis in (large, last)) == 3 * 56


def test_every_width_of_blocks_once() -> None:
    for size in range(1, 200):
        assert [*_widths(size)] == [*dict.fromkeys(-(-size // n) for n in range(1, size + 1))]


def test_a_wide_padding_is_not_counted_position_by_position() -> None:
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    known, factor = (conv_input_factor(x, 2, padding=padding) for padding in (2, 2**20))
    torch.testing.assert_close(factor, known)
