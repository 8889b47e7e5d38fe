"""The operations that einconv lacks, against torch.func and definitions."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import CONV_CASES, HIGH_CASES, UNMET, ConvCase, case_id
from drawn_cases import conv_cases
from hypothesis import given, settings
from oracles import contracted, reference, unfolded, unfolded_transposed
from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.geometry import output_padding_of
from einconv_kfac.network import Network, simplified

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own


def expression_of(operation: str, *arguments: Any, **keywords: Any) -> Any:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    return module.einsum_expression(*arguments, **keywords)


def check(operation: str, expected: Tensor, *arguments: Any, **keywords: Any) -> None:
    """The operation gives the expected tensor, simplified and not."""
    for simplify in (True, False):
        result = contracted(expression_of(operation, *arguments, **keywords, simplify=simplify))
        torch.testing.assert_close(result, expected)


def check_network(network: Network, expected: Tensor, *tensors: Tensor) -> None:
    """The evaluator gives the expected tensor, simplified and not."""
    torch.testing.assert_close(evaluate(network, *tensors), expected)
    torch.testing.assert_close(evaluate(simplified(network), *tensors), expected)


def network_of(operation: str, *arguments: Any) -> Network:
    network: Callable[..., Network] = import_module(f"einconv_kfac.expressions.{operation}").network
    return network(*arguments)


def vectors(case: ConvCase, count: int = 2) -> Tensor:
    return torch.stack([case.output_like() * (j + 1) - j for j in range(count)])


def per_example(case: ConvCase, v: Tensor) -> Tensor:
    """The weight VJP of every example by torch.func, ``[n, (g co), ci, *k]``."""
    weight, x = case.weight(), case.input()

    def forward(weight: Tensor, x: Tensor) -> Tensor:
        return reference(x[None], weight, case.geometry)[0]

    def pullback(x: Tensor, v: Tensor) -> Tensor:
        return torch.func.vjp(lambda w: forward(w, x), weight)[1](v)[0]

    return torch.stack([pullback(*pair) for pair in zip(x, v)])


def fold(case: ConvCase) -> None:
    geometry, x = case.geometry, case.input()
    columns = unfolded(x, geometry).flatten(1, 2).cos()
    _, pullback = torch.func.vjp(lambda x: unfolded(x, geometry).flatten(1, 2), x)
    (expected,) = pullback(columns)
    options = case.ungrouped
    check("convNd_fold", expected, columns, case.input_size, case.kernel_size, **options)
    network = network_of("convNd_fold", geometry, case.batch, case.in_channels)
    check_network(network, expected, columns)


def toeplitz(case: ConvCase) -> None:
    weight, x = case.weight(), case.input()
    size, groups = case.geometry, case.groups
    network = network_of("convNd_toeplitz", size, case.in_channels, case.out_channels)
    matrix = evaluate(network, weight)
    xs = x.flatten(2).unflatten(1, (groups, -1)).flatten(2)
    result = torch.einsum("gab,ngb->nga", matrix, xs).reshape(case.output_like().shape)
    torch.testing.assert_close(result, reference(x, weight, case.geometry))
    check_network(network, matrix, weight)
    check("convNd_toeplitz", matrix, weight, case.input_size, **case.options)


def jvps(case: ConvCase) -> None:
    x, weight = case.input(), case.weight()
    geometry = case.geometry
    tangent = x.sin()
    _, expected = torch.func.jvp(lambda x: reference(x, weight, geometry), (x,), (tangent,))
    check("convNd_input_jvp", expected, weight, tangent, **case.options)
    tangent = weight.sin()
    _, expected = torch.func.jvp(lambda w: reference(x, w, geometry), (weight,), (tangent,))
    check("convNd_weight_jvp", expected, x, tangent, **case.options)


def per_example_weight_vjp(case: ConvCase) -> None:
    x, v, name = case.input(), case.output_like(), "convNd_per_example_weight_vjp"
    expected = per_example(case, v)
    check(name, expected, x, v, case.kernel_size, **case.options)
    channels = case.in_channels, case.out_channels
    check_network(network_of(name, case.geometry, case.batch, *channels), expected, x, v)
    bias_network = import_module(f"einconv_kfac.expressions.{name}").bias_network
    check_network(bias_network(case.geometry, case.batch, channels[1]), v.flatten(2).sum(-1), v)
    norms = expected.flatten(1).square().sum(1)
    check("convNd_gradient_norm", norms, x, v, case.kernel_size, **case.options)
    name = "convNd_gradient_norm"
    check_network(network_of(name, case.geometry, case.batch, *channels), norms, x, v)


def ggn_diagonal_and_gram(case: ConvCase) -> None:
    x, s = case.input(), vectors(case)
    jacobian = torch.stack([per_example(case, v) for v in s])  # [v, n, (g co), ci, *k]
    sizes = case.geometry, 2, case.batch, case.in_channels, case.out_channels
    diagonal, name = jacobian.square().sum((0, 1)), "convNd_ggn_diagonal"
    check(name, diagonal, x, s, case.kernel_size, **case.options)
    check_network(network_of(name, *sizes), diagonal, x, s)
    rows = jacobian.flatten(2).flatten(0, 1)
    gram, name = rows @ rows.T, "convNd_gram"
    check(name, gram, x, s, case.kernel_size, **case.options)
    check_network(network_of(name, *sizes), gram, x, s)
    sums = s.flatten(3).sum(-1)  # [v, n, (g co)]
    for name, expected in [
        ("convNd_ggn_diagonal", sums.square().sum((0, 1))),
        ("convNd_gram", sums.flatten(0, 1) @ sums.flatten(0, 1).T),
    ]:
        bias_network = import_module(f"einconv_kfac.expressions.{name}").bias_network
        check_network(bias_network(case.geometry, 2, case.batch, case.out_channels), expected, s)


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


def conv_transpose_geometry(case: ConvCase) -> None:
    weight, x, v = case.weight(), case.output_like(), case.input().cos()
    geometry = case.geometry
    options = {**transposed_options(case), "groups": case.groups}
    result, pullback = torch.func.vjp(lambda v: reference(v, weight, geometry), v)
    (expected,) = pullback(x)
    check("conv_transposeNd_forward", expected, x, weight, **options)
    options.pop("output_padding")
    check("conv_transposeNd_input_vjp", result, weight, v, **options)
    _, pullback = torch.func.vjp(lambda w: reference(v, w, geometry), weight)
    arguments = x, v, case.kernel_size
    check("conv_transposeNd_weight_vjp", pullback(x)[0], *arguments, **options)


def transposed_unfold_and_factors(case: ConvCase) -> None:
    x, geometry, options = case.output_like(), case.geometry, transposed_options(case)
    columns = unfolded_transposed(x, geometry)
    arguments, sizes = (x, case.kernel_size), (geometry, case.batch, case.out_channels)
    expected, name = columns.flatten(1, 2), "conv_transposeNd_unfold"
    check(name, expected, *arguments, **options)
    check_network(network_of(name, *sizes), expected, x)
    options["groups"] = case.groups
    expected, name = torch.einsum("ngap,ngbp->gab", columns, columns), "conv_transposeNd_kfc"
    check(name, expected / case.batch, *arguments, **options)
    check_network(network_of(name, *sizes), expected / case.batch, x)
    mean, name = columns.mean(-1), "conv_transposeNd_kfac_reduce"
    expected = torch.einsum("nga,ngb->gab", mean, mean) / case.batch
    check(name, expected, *arguments, **options)
    options.pop("output_padding")
    check(name, expected, *arguments, **options, output_size=case.input_size)
    check_network(network_of(name, *sizes), expected, x)


CHECKS = [
    fold,
    toeplitz,
    jvps,
    per_example_weight_vjp,
    ggn_diagonal_and_gram,
    conv_transpose_geometry,
    transposed_unfold_and_factors,
]
ALL_CHECKS = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@pytest.mark.parametrize("case", [*CONV_CASES, *HIGH_CASES, UNMET], ids=case_id)
@ALL_CHECKS
def test_operation(check: Callable[[ConvCase], None], case: ConvCase) -> None:
    check(case)


@ALL_CHECKS
@settings(max_examples=50)
@given(case=conv_cases())
def test_operation_on_drawn_geometries(check: Callable[[ConvCase], None], case: ConvCase) -> None:
    check(case)
