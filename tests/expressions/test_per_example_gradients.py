"""Per-example gradients, their norms, GGN diagonal and Gram matrix against torch.func."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from expression_checks import EVERY_CASE, check_expression, check_network, network_of
from hypothesis import given, settings
from oracles import reference
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own


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


def per_example_weight_vjp(case: ConvCase) -> None:
    x, v, name = case.input(), case.output_like(), "convNd_per_example_weight_vjp"
    expected = per_example(case, v)
    check_expression(name, expected, x, v, case.kernel_size, **case.options)
    channels = case.in_channels, case.out_channels
    check_network(network_of(name, case.geometry, case.batch, *channels), expected, x, v)
    bias_network = import_module(f"einconv_kfac.expressions.{name}").bias_network
    check_network(bias_network(case.geometry, case.batch, channels[1]), v.flatten(2).sum(-1), v)
    norms = expected.flatten(1).square().sum(1)
    check_expression("convNd_gradient_norm", norms, x, v, case.kernel_size, **case.options)
    name = "convNd_gradient_norm"
    check_network(network_of(name, case.geometry, case.batch, *channels), norms, x, v)


def ggn_diagonal_and_gram(case: ConvCase) -> None:
    x, s = case.input(), vectors(case)
    jacobian = torch.stack([per_example(case, v) for v in s])  # [v, n, (g co), ci, *k]
    sizes = case.geometry, 2, case.batch, case.in_channels, case.out_channels
    diagonal, name = jacobian.square().sum((0, 1)), "convNd_ggn_diagonal"
    check_expression(name, diagonal, x, s, case.kernel_size, **case.options)
    check_network(network_of(name, *sizes), diagonal, x, s)
    rows = jacobian.flatten(2).flatten(0, 1)
    gram, name = rows @ rows.T, "convNd_gram"
    check_expression(name, gram, x, s, case.kernel_size, **case.options)
    check_network(network_of(name, *sizes), gram, x, s)
    sums = s.flatten(3).sum(-1)  # [v, n, (g co)]
    for name, expected in [
        ("convNd_ggn_diagonal", sums.square().sum((0, 1))),
        ("convNd_gram", sums.flatten(0, 1) @ sums.flatten(0, 1).T),
    ]:
        bias_network = import_module(f"einconv_kfac.expressions.{name}").bias_network
        check_network(bias_network(case.geometry, 2, case.batch, case.out_channels), expected, s)


@EVERY_CASE
def test_per_example_weight_vjp(case: ConvCase) -> None:
    per_example_weight_vjp(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_per_example_weight_vjp_on_drawn_geometries(case: ConvCase) -> None:
    per_example_weight_vjp(case)


@EVERY_CASE
def test_ggn_diagonal_and_gram(case: ConvCase) -> None:
    ggn_diagonal_and_gram(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_ggn_diagonal_and_gram_on_drawn_geometries(case: ConvCase) -> None:
    ggn_diagonal_and_gram(case)
