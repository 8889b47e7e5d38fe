"""The factors against their definition: unfold and multiply, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from torch import Tensor

from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.geometry import Geometry, transposed_convolution

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def columns_by_definition(x: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
    """Return ``[n, g, (ci k), s]``, one window entry after the other."""
    n, c = x.shape[:2]
    sizes = geometry.input_size if transposed else geometry.output_size
    columns = x.new_zeros(n, c, *geometry.kernel_size, *sizes)
    for k in product(*map(range, geometry.kernel_size)):
        outputs = [axis.outputs(entry) for axis, entry in zip(geometry.axes, k)]
        if transposed:  # a large output padding leaves outputs that the layer's input lacks
            outputs = [range(o.start, min(o.stop, size)) for o, size in zip(outputs, x.shape[2:])]
        for o in product(*outputs):
            i = tuple(a.input_position(*p) for a, p in zip(geometry.axes, zip(k, o)))
            here, there = (i, o) if transposed else (o, i)
            columns[(..., *k, *here)] = x[(..., *there)]
    return columns.reshape(n, geometry.groups, c // geometry.groups * len(k_all(geometry)), -1)


def k_all(geometry: Geometry) -> list[tuple[int, ...]]:
    return list(product(*map(range, geometry.kernel_size)))


def factor_by_definition(columns: Tensor, approximation: str, bias: bool) -> Tensor:
    """Return the factor of the columns ``[n, g, d, s]``."""
    if bias:
        columns = torch.cat([columns, torch.ones_like(columns[:, :, :1])], dim=2)
    if approximation == "reduce":
        columns = columns.mean(-1, keepdim=True)
    return torch.einsum("ngas,ngbs->gab", columns, columns) / columns.shape[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_input_factor(case: ConvCase, approximation: str, bias: bool) -> None:
    x = case.input()
    columns = columns_by_definition(x, case.geometry)
    expected = factor_by_definition(columns, approximation, bias)
    options = {**case.options, "approximation": approximation, "bias": bias}
    got = conv_input_factor(x, case.kernel_size, **options)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    out = torch.eye(got.shape[1], dtype=x.dtype).repeat(case.groups, 1, 1)
    target = 0.5 * out + 2.0 * expected
    updated = conv_input_factor(x, case.kernel_size, **options, out=out, beta=0.5, alpha=2.0)
    assert updated is out
    torch.testing.assert_close(out, target, **TOLERANCE)
    assert torch.equal(out, out.mT)


TRANSPOSED = [
    ((5,), {"kernel_size": 3}),
    ((5,), {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    ((4,), {"kernel_size": 2, "stride": 4}),
    ((4,), {"kernel_size": 4, "stride": 6, "dilation": 4, "padding": ((2, 1),)}),
    ((5,), {"kernel_size": 5, "stride": 2, "dilation": 3, "padding": 6, "output_padding": 2}),
    ((2,), {"kernel_size": 3, "stride": 3, "padding": 2}),
    ((3, 4), {"kernel_size": (3, 4), "stride": (2, 1), "padding": (1, 2), "groups": 2}),
    ((3, 2, 2), {"kernel_size": (3, 2, 1), "stride": (2, 3, 1), "dilation": (1, 2, 1)}),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("size", "options"), TRANSPOSED, ids=str)
def test_transposed_input_factor(
    size: tuple[int, ...], options: dict[str, object], approximation: str, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64)
    columns = columns_by_definition(x, transposed_convolution(size, **options), transposed=True)
    expected = factor_by_definition(columns, approximation, bias)
    options = {**options, "approximation": approximation, "bias": bias}
    got = conv_transpose_input_factor(x, **options)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    out = torch.ones_like(got)
    conv_transpose_input_factor(x, **options, out=out, beta=0.25, alpha=3.0)
    torch.testing.assert_close(out, 0.25 + 3.0 * expected, **TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("shared", [(), (5,), (2, 3)], ids=str)
def test_linear_input_factor(shared: tuple[int, ...], approximation: str, bias: bool) -> None:
    a = torch.randn(4, *shared, 6, dtype=torch.float64)
    expected = factor_by_definition(a.reshape(4, 1, -1, 6).mT, approximation, bias)
    got = linear_input_factor(a, approximation, bias)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    out = torch.ones_like(got)
    linear_input_factor(a, approximation, bias, out=out, beta=0.25, alpha=3.0)
    torch.testing.assert_close(out, 0.25 + 3.0 * expected, **TOLERANCE)
    assert torch.equal(out, out.mT)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_output_factor(approximation: str, groups: int) -> None:
    g = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
    columns = g.reshape(8, groups, 6 // groups, 15)
    if approximation == "expand":
        expected = torch.einsum("ngas,ngbs->gab", columns, columns) / (4 * 15)
    else:
        expected = torch.einsum("nga,ngb->gab", columns.sum(-1), columns.sum(-1)) / 4
    got = conv_output_factor(g, groups, approximation)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    out = torch.ones_like(got)
    last = g.flatten(3).movedim(2, 3)
    output_factor(last, groups, approximation, out=out, beta=0.25, alpha=3.0)
    torch.testing.assert_close(out, 0.25 + 3.0 * expected, **TOLERANCE)
