"""Each algorithm alone, on drawn convolutions of its domain, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factor_definition import columns, factor
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from einconv_kfac.curvature.factors import conv_input_factor, conv_transpose_input_factor
from einconv_kfac.curvature.factors.algorithms.output_blocks import bands
from einconv_kfac.curvature.factors.algorithms.rows import row_bands
from einconv_kfac.curvature.factors.choice import ALGORITHMS, applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Axis, Geometry, conv_transpose_geometry

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
DRAWN = settings(derandomize=True, max_examples=100, deadline=None, database=None)
LARGEST = (12, 8, 5, 4)


@st.composite
def axes(draw: st.DrawFn, largest: int, entries: int = 4) -> Axis:
    """Draw one dimension with every hyper-parameter."""
    kernel, dilation = draw(st.integers(1, entries)), draw(st.integers(1, 3))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = max(1, (kernel - 1) * dilation + 1 - sum(padding))
    size = draw(st.integers(least, max(least, largest)))
    return Axis(size, kernel, draw(st.integers(1, 4)), padding, dilation)


@st.composite
def geometries(draw: st.DrawFn, entries: int = 4, largest: int = 4) -> Geometry:
    """Draw a convolution of one to four dimensions."""
    ndim = draw(st.integers(1, largest))
    entries = min(entries, 5 - ndim) if ndim > 2 else entries
    found = [draw(axes(LARGEST[ndim - 1], entries)) for _ in range(ndim)]
    return Geometry(tuple(found), draw(st.sampled_from([1, 1, 2, 3])))


def draw_input(geometry: Geometry, channels: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, geometry.groups * channels, *geometry.input_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def options_of(geometry: Geometry) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(geometry, name) for name in names}


def check_update(x: torch.Tensor, expected: torch.Tensor, options: dict[str, Any]) -> None:
    """Check that a running average of other factors is updated, and stays symmetric."""
    old = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    old = old + old.mT
    out = conv_input_factor(x, **options, out=old.clone(), beta=0.5, alpha=2.0)
    torch.testing.assert_close(out, 0.5 * old + 2 * expected, **TOLERANCE)
    assert torch.equal(out, out.mT)
    fresh = conv_input_factor(x, **options)
    torch.testing.assert_close(fresh, expected, **TOLERANCE)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "fused"])  # CUDA
@given(data=st.data())
@DRAWN
def test_expand(algorithm: str, data: st.DataObject) -> None:
    largest = 3 if algorithm == "correlations" else 4
    geometry = data.draw(geometries(1 if algorithm == "pointwise" else 4, largest))
    channels, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    problem = Problem(geometry, batch, channels, torch.float64, "cpu")
    assume(algorithm in applicable(problem))
    x = draw_input(geometry, channels, batch)
    bias = data.draw(st.booleans())
    expected = factor(columns(x, geometry), "expand", bias)
    options = {**options_of(geometry), "bias": bias, "algorithm": algorithm}
    check_update(x, expected, options)


@given(geometries(), st.integers(1, 3), st.integers(1, 3), st.booleans())
@DRAWN
def test_reduce(geometry: Geometry, channels: int, batch: int, bias: bool) -> None:
    x = draw_input(geometry, channels, batch)
    expected = factor(columns(x, geometry), "reduce", bias)
    got = conv_input_factor(x, **options_of(geometry), approximation="reduce", bias=bias)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@given(geometries(), st.data())
@DRAWN
def test_transposed(approximation: str, geometry: Geometry, data: st.DataObject) -> None:
    options = options_of(geometry)
    extra = [data.draw(st.integers(0, max(a.stride, a.dilation) - 1)) for a in geometry.axes]
    try:
        adjoint = conv_transpose_geometry(geometry.input_size, output_padding=extra, **options)
    except ValueError:
        return  # padding leaves no output
    x, bias = draw_input(geometry, 2, 2), data.draw(st.booleans())
    expected = factor(columns(x, adjoint, transposed=True), approximation, bias)
    options = {**options, "approximation": approximation, "bias": bias}
    got = conv_transpose_input_factor(x, output_padding=extra, **options)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("algorithm", ["lags", "correlations", "bands", "rows", "grams", "im2col"])
def test_many_parts(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is processed one example at a time, with channels in several blocks."""
    monkeypatch.setattr("einconv_kfac.curvature.factors.chunking.chunk_size", lambda *_: 1)
    monkeypatch.setattr("einconv_kfac.curvature.factors.symmetric.channel_blocks.BLOCK_ROWS", 18)
    monkeypatch.setattr(
        "einconv_kfac.curvature.factors.symmetric.channel_blocks.FEWEST_BLOCK_CHANNELS", 2
    )
    geometry = Geometry((Axis(7, 3, 1, (1, 1)), Axis(8, 3, 2, (1, 1))))
    x = draw_input(geometry, 5, 4)
    expected = factor(columns(x, geometry), "expand")
    check_update(x, expected, {**options_of(geometry), "algorithm": algorithm})


def test_bands_of_some_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise, with several bands of equal width, one that remains, and a last, smaller part."""
    monkeypatch.setattr(
        "einconv_kfac.curvature.factors.algorithms.bands.groups_at_once", lambda *_: 2
    )
    geometry = Geometry((Axis(5, 3, 1, (1, 1)), Axis(44, 3, 1, (1, 2))), 5)
    assert [band.count for band in bands(geometry.axes[-1])] == [3, 1]
    x = draw_input(geometry, 1, 3)
    options = {**options_of(geometry), "algorithm": "bands"}
    check_update(x, factor(columns(x, geometry), "expand"), options)


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of one width and one of another, a few rows at a time, with dilation."""
    monkeypatch.setattr("einconv_kfac.curvature.factors.algorithms.rows.BLOCK_CALL_MACS", 0.0)
    monkeypatch.setattr("einconv_kfac.curvature.factors.algorithms.rows.BAND_CALL_MACS", 0.0)
    monkeypatch.setattr("einconv_kfac.curvature.factors.algorithms.rows.LEAST_PRODUCT_ELEMENTS", 1)
    geometry = Geometry((Axis(9, 3, 1, (1, 2), 2), Axis(23, 3, 1, (1, 1))))
    problem = Problem(geometry, 3, 2, torch.float64, "cpu")
    row_bands.cache_clear()
    assert sum(band.count for band in row_bands(problem)) > 2
    x = draw_input(geometry, 2, 3)
    options = {**options_of(geometry), "algorithm": "rows"}
    check_update(x, factor(columns(x, geometry), "expand"), options)
    row_bands.cache_clear()


@pytest.mark.parametrize("algorithm", ["bands", "grams"])
def test_places_that_are_not_kept(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are gathered, or written, as if the factor were a large one."""
    monkeypatch.setattr("einconv_kfac.curvature.factors.symmetric.gather.KEPT", 0)
    monkeypatch.setattr("einconv_kfac.curvature.factors.symmetric.region_sums.KEPT", 0)
    geometry = Geometry((Axis(5, 3, 1, (1, 1)), Axis(6, 3, 1, (1, 1))))
    x = draw_input(geometry, 2, 3)
    options = {**options_of(geometry), "algorithm": algorithm}
    check_update(x, factor(columns(x, geometry), "expand"), options)


@pytest.mark.parametrize("algorithm", ["lags", "correlations"])
def test_channels_far_apart(algorithm: str) -> None:
    """Images so large that a few channels are copied at a time."""
    geometry = Geometry((Axis(33, 3, 1, (1, 1)), Axis(32, 3, 1, (1, 1))))
    x = draw_input(geometry, 19, 2)
    options = {**options_of(geometry), "algorithm": algorithm}
    check_update(x, factor(columns(x, geometry), "expand"), options)


def test_pointwise_in_halves() -> None:
    """An input of which half of the examples are gathered at a time."""
    geometry = Geometry((Axis(11, 1), Axis(11, 1)))
    x = draw_input(geometry, 97, 16)
    options = {**options_of(geometry), "algorithm": "pointwise"}
    check_update(x, factor(columns(x, geometry), "expand"), options)


@given(geometries(), st.integers(1, 300), st.sampled_from(["cpu", "cuda"]))
@DRAWN
def test_choice_is_applicable_and_costs_are_positive(
    geometry: Geometry, channels: int, device: str
) -> None:
    problem = Problem(geometry, 8, channels, torch.float32, device)
    assert choose(problem) in applicable(problem)
    for name in applicable(problem):
        cost = ALGORITHMS[name].cost(problem)
        assert min(cost.macs, cost.copied, cost.written, cost.calls) >= 0
        assert cost.width >= 1


def test_algorithms_are_in_the_order_of_ties() -> None:
    names = ("lags", "correlations", "bands", "rows", "grams", "im2col", "pointwise", "fused")
    assert tuple(ALGORITHMS) == names
    assert [algorithm.rank for algorithm in ALGORITHMS.values()] == list(range(len(names)))
