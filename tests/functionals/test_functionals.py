"""Functionals against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CONV_CASES, UNMET, ConvCase, case_id
from oracles import CONVOLUTIONS, TRANSPOSED, convolve, unfolded, unfolded_transposed
from torch.nn import functional

from einconv_kfac.functionals import (
    conv_transposeNd,
    convNd,
    foldNd,
    unfoldNd,
    unfoldNd_transpose,
)
from einconv_kfac.geometry import conv_geometry, output_padding_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
ALL_CASES = pytest.mark.parametrize("case", [*CONV_CASES, UNMET], ids=case_id)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])


@ALL_CASES
@SIMPLIFY
def test_convolution_equals_torch(case: ConvCase, simplify: bool) -> None:
    x, weight = case.input(), case.weight()
    bias = torch.linspace(-1, 1, case.out_channels, dtype=torch.float64)
    expected = CONVOLUTIONS[len(case.input_size)](x, weight, bias, **case.options)
    torch.testing.assert_close(convNd(x, weight, bias, **case.options, simplify=simplify), expected)
    torch.testing.assert_close(convNd(x[0], weight, bias, **case.options), expected[0])


@pytest.mark.parametrize("case", [c for c in CONV_CASES if len(c.input_size) == 2], ids=case_id)
def test_unfold_equals_torch(case: ConvCase) -> None:
    x, geometry = case.input(), case.geometry
    padded = functional.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    keywords = {"stride": geometry.stride, "dilation": geometry.dilation}
    expected = functional.unfold(padded, case.kernel_size, **keywords)
    torch.testing.assert_close(unfoldNd(x, case.kernel_size, **case.ungrouped), expected)


def transposed_options(case: ConvCase) -> dict[str, Any]:
    """The options, for torch and for ours, of the transposed convolution of a case's sizes."""
    geometry = case.geometry
    options = {"stride": geometry.stride, "dilation": geometry.dilation}
    same = all(left == right for left, right in geometry.padding)
    options["padding"] = tuple(p for p, _ in geometry.padding) if same else geometry.padding
    sizes = case.input_size, geometry.output_size, case.kernel_size
    return {**options, "output_padding": output_padding_of(*sizes, **options)}


SYMMETRIC = [c for c in CONV_CASES if all(left == right for left, right in c.geometry.padding)]


@pytest.mark.parametrize("case", SYMMETRIC, ids=case_id)
@SIMPLIFY
def test_transposed_convolution_equals_torch(case: ConvCase, simplify: bool) -> None:
    x, weight = case.output_like(), case.weight()
    bias = torch.linspace(-1, 1, case.in_channels, dtype=torch.float64)
    options = {**transposed_options(case), "groups": case.groups}
    expected = TRANSPOSED[len(case.input_size)](x, weight, bias, **options)
    result = conv_transposeNd(x, weight, bias, **options, simplify=simplify)
    torch.testing.assert_close(result, expected)
    result = conv_transposeNd(x[0], weight, bias, **options, simplify=simplify)
    torch.testing.assert_close(result, expected[0])


@ALL_CASES
@SIMPLIFY
def test_unfolds_equal_definitions(case: ConvCase, simplify: bool) -> None:
    geometry, x, v = case.geometry, case.input(), case.output_like()
    columns = unfolded(x, geometry).flatten(1, 2)
    options = {**case.ungrouped, "simplify": simplify}
    torch.testing.assert_close(unfoldNd(x, case.kernel_size, **options), columns)
    folded = foldNd(columns.cos(), case.input_size, case.kernel_size, **options)
    torch.testing.assert_close((folded * x).sum(), (columns.cos() * columns).sum())
    single = foldNd(columns[0].cos(), case.input_size, case.kernel_size, **options)
    torch.testing.assert_close(single, folded[0])
    keywords = {**transposed_options(case), "simplify": simplify}
    expected = unfolded_transposed(v, geometry).flatten(1, 2)
    torch.testing.assert_close(unfoldNd_transpose(v, case.kernel_size, **keywords), expected)


@pytest.mark.parametrize("ndim", [4, 5])
@SIMPLIFY
def test_convolution_in_many_dimensions(ndim: int, simplify: bool) -> None:
    torch.manual_seed(0)
    sizes, kernel = (4, 3, 5, 3, 2)[:ndim], (2, 3, 2, 1, 2)[:ndim]
    options = {"stride": (2, 1, 1, 2, 1)[:ndim], "padding": 1, "dilation": (1, 1, 2, 1, 1)[:ndim]}
    geometry = conv_geometry(sizes, kernel, **options, groups=2)
    x = torch.randn(2, 4, *sizes, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, *kernel, dtype=torch.float64, requires_grad=True)
    result = convNd(x, weight, **options, groups=2, simplify=simplify)
    expected = convolve(x, weight, geometry)
    torch.testing.assert_close(result, expected)
    v = torch.randn_like(expected)
    for ours, definition in zip(
        torch.autograd.grad(result, (x, weight), v), torch.autograd.grad(expected, (x, weight), v)
    ):
        torch.testing.assert_close(ours, definition)
