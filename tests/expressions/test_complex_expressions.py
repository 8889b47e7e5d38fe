"""Expressions of complex tensors: a VJP has the conjugates that torch's has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expression_checks import check_expression
from oracles import CONVOLUTIONS, TRANSPOSED
from torch import Tensor

from einconv_kfac.expressions import convNd_forward, convNd_weight_vjp

OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": 3},
    {"groups": 2, "dilation": 2, "padding": 2},
]
CASES = pytest.mark.parametrize("options", OPTIONS, ids=str)
DIMENSIONS = pytest.mark.parametrize("ndim", [1, 2])
TYPES = pytest.mark.parametrize("dtype", [torch.complex128, torch.float64], ids=str)


def operands(ndim: int, options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(9, 7)[:ndim], dtype=dtype)
    return x, torch.randn(6, 4 // options.get("groups", 1), *(3, 2)[:ndim], dtype=dtype)


@DIMENSIONS
@CASES
@TYPES
def test_products_with_jacobians(ndim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, weight = operands(ndim, options, dtype)
    y, pullback = torch.func.vjp(lambda x, w: CONVOLUTIONS[ndim](x, w, **options), x, weight)
    v, kernel = torch.randn_like(y), weight.shape[2:]
    for_input, for_weight = pullback(v)
    check_expression("convNd_forward", y, x, weight, **options)
    check_expression("convNd_input_jvp", y, weight, x, **options)
    check_expression("convNd_weight_jvp", y, x, weight, **options)
    check_expression("convNd_input_vjp", for_input, weight, v, x.shape[2:], **options)
    check_expression("convNd_weight_vjp", for_weight, x, v, kernel, **options)


@DIMENSIONS
@CASES
@TYPES
def test_of_each_example(ndim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, weight = operands(ndim, options, dtype)

    def gradient(x: Tensor, v: Tensor) -> Tensor:
        def convolve(weight: Tensor) -> Tensor:
            return CONVOLUTIONS[ndim](x[None], weight, **options)

        return torch.func.vjp(convolve, weight)[1](v[None])[0]

    s = torch.randn(3, *CONVOLUTIONS[ndim](x, weight, **options).shape, dtype=dtype)
    each = torch.stack([torch.stack([gradient(*pair) for pair in zip(x, v)]) for v in s])
    arguments, kernel = (x, s[0]), weight.shape[2:]
    check_expression("convNd_per_example_weight_vjp", each[0], *arguments, kernel, **options)
    squares = each.abs().square().to(dtype)
    norms = squares[0].flatten(1).sum(1)
    check_expression("convNd_gradient_norm", norms, *arguments, kernel, **options)
    check_expression("convNd_ggn_diagonal", squares.sum((0, 1)), x, s, kernel, **options)
    rows = each.flatten(2).flatten(0, 1)
    check_expression("convNd_gram", rows @ rows.mH, x, s, kernel, **options)


@DIMENSIONS
@CASES
@TYPES
def test_transposed(ndim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    _, weight = operands(ndim, options, dtype)
    x = torch.randn(2, 6, *(4, 5)[:ndim], dtype=dtype)
    y, pullback = torch.func.vjp(lambda x, w: TRANSPOSED[ndim](x, w, **options), x, weight)
    v = torch.randn_like(y)
    for_input, for_weight = pullback(v)
    check_expression("conv_transposeNd_forward", y, x, weight, **options)
    check_expression("conv_transposeNd_input_vjp", for_input, weight, v, **options)
    arguments = x, v, weight.shape[2:]
    check_expression("conv_transposeNd_weight_vjp", for_weight, *arguments, **options)


def test_tensors_of_two_types_are_refused() -> None:
    x, weight = torch.rand(2, 3, 8), torch.rand(4, 3, 2)
    with pytest.raises(ValueError, match=r"`weight` must be torch.float32, as `x`, got .*64"):
        convNd_forward.einsum_expression(x, weight.double())
    with pytest.raises(ValueError, match="`v` must be on cpu, as `x`, got meta"):
        convNd_weight_vjp.einsum_expression(x, torch.rand(2, 4, 7, device="meta"), 2)
    with pytest.raises(TypeError, match="`weight` must be a tensor, got None"):
        convNd_forward.einsum_expression(x, None)  # type: ignore[arg-type]
