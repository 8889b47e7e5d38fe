"""The factors against their definition: unfold and multiply, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from factor_definition import columns, factor

from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.geometry import conv_transpose_geometry

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_input_factor(case: ConvCase, approximation: str, bias: bool) -> None:
    x = case.input()
    unfolded = columns(x, case.geometry)
    expected = factor(unfolded, approximation, bias)
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
    unfolded = columns(x, conv_transpose_geometry(size, **options), transposed=True)
    expected = factor(unfolded, approximation, bias)
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
    expected = factor(a.reshape(4, 1, -1, 6).mT, approximation, bias)
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
    rows = g.reshape(8, groups, 6 // groups, 15)
    if approximation == "expand":
        expected = torch.einsum("ngas,ngbs->gab", rows, rows) / (4 * 15)
    else:
        expected = torch.einsum("nga,ngb->gab", rows.sum(-1), rows.sum(-1)) / 4
    got = conv_output_factor(g, groups, approximation)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(got, got.mT)
    out = torch.ones_like(got)
    last = g.flatten(3).movedim(2, 3)
    output_factor(last, groups, approximation, out=out, beta=0.25, alpha=3.0)
    torch.testing.assert_close(out, 0.25 + 3.0 * expected, **TOLERANCE)
