"""Expressions of transposed convolutions against torch.func and definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from expression_checks import (
    EVERY_CASE,
    check_expression,
    check_network,
    expression_of,
    network_of,
)
from hypothesis import given, settings
from oracles import contracted, reference, unfolded_transposed

from einconv_kfac.geometry import output_padding_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own


def transposed_options(case: ConvCase) -> dict[str, Any]:
    """The options of the transposed convolution with the case's sizes."""
    geometry = case.geometry
    options = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
    }
    sizes = case.input_size, geometry.output_size, case.kernel_size
    extra = output_padding_of(*sizes, **options)
    return {**options, "output_padding": extra}


def transposed_convolution(case: ConvCase) -> None:
    weight, x, v = case.weight(), case.output_like(), case.input().cos()
    geometry = case.geometry
    options = {**transposed_options(case), "groups": case.groups}
    result, pullback = torch.func.vjp(lambda v: reference(v, weight, geometry), v)
    (expected,) = pullback(x)
    check_expression("conv_transposeNd_forward", expected, x, weight, **options)
    options.pop("output_padding")
    check_expression("conv_transposeNd_input_vjp", result, weight, v, **options)
    _, pullback = torch.func.vjp(lambda w: reference(v, w, geometry), weight)
    arguments = x, v, case.kernel_size
    check_expression("conv_transposeNd_weight_vjp", pullback(x)[0], *arguments, **options)


def transposed_unfold_and_factors(case: ConvCase) -> None:
    x, geometry, options = case.output_like(), case.geometry, transposed_options(case)
    columns = unfolded_transposed(x, geometry)
    arguments, sizes = (x, case.kernel_size), (geometry, case.batch, case.out_channels)
    expected, name = columns.flatten(1, 2), "conv_transposeNd_unfold"
    check_expression(name, expected, *arguments, **options)
    check_network(network_of(name, *sizes), expected, x)
    options["groups"] = case.groups
    expected, name = torch.einsum("ngap,ngbp->gab", columns, columns), "conv_transposeNd_kfc"
    check_expression(name, expected / case.batch, *arguments, **options)
    check_network(network_of(name, *sizes), expected / case.batch, x)
    mean, name = columns.mean(-1), "conv_transposeNd_kfac_reduce"
    expected = torch.einsum("nga,ngb->gab", mean, mean) / case.batch
    check_expression(name, expected, *arguments, **options)
    options.pop("output_padding")
    check_expression(name, expected, *arguments, **options, output_size=case.input_size)
    check_network(network_of(name, *sizes), expected, x)


@EVERY_CASE
def test_transposed_convolution(case: ConvCase) -> None:
    transposed_convolution(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_transposed_convolution_on_drawn_geometries(case: ConvCase) -> None:
    transposed_convolution(case)


@EVERY_CASE
def test_transposed_unfold_and_factors(case: ConvCase) -> None:
    transposed_unfold_and_factors(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_transposed_unfold_and_factors_on_drawn_geometries(case: ConvCase) -> None:
    transposed_unfold_and_factors(case)


@pytest.mark.parametrize(("stride", "dilation", "extra"), [(1, 2, 1), (2, 3, 2), (1, 3, 2)])
def test_output_padding_beyond_the_stride(stride: int, dilation: int, extra: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": 1, "groups": 2}
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.conv_transpose2d(x, weight, None, stride, 1, extra, groups=2, dilation=dilation)
    v = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight), v)
    check_expression("conv_transposeNd_weight_vjp", gradients[1], x.detach(), v, (3, 2), **options)
    for simplify in (True, False):
        arguments = {**options, "simplify": simplify}
        found = expression_of("conv_transposeNd_input_vjp", weight.detach(), v, **arguments)
        torch.testing.assert_close(contracted(found)[..., :5, :6], gradients[0])
