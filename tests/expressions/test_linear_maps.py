"""Fold, Toeplitz matrix and Jacobian-vector products against torch.func and definitions."""

from __future__ import annotations

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from expression_checks import EVERY_CASE, check_expression, check_network, network_of
from hypothesis import given, settings
from oracles import reference, unfolded

from einconv_kfac.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own


def fold(case: ConvCase) -> None:
    geometry, x = case.geometry, case.input()
    columns = unfolded(x, geometry).flatten(1, 2).cos()
    _, pullback = torch.func.vjp(lambda x: unfolded(x, geometry).flatten(1, 2), x)
    (expected,) = pullback(columns)
    options = case.ungrouped
    check_expression("convNd_fold", expected, columns, case.input_size, case.kernel_size, **options)
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
    check_expression("convNd_toeplitz", matrix, weight, case.input_size, **case.options)


def jvps(case: ConvCase) -> None:
    x, weight = case.input(), case.weight()
    geometry = case.geometry
    tangent = x.sin()
    _, expected = torch.func.jvp(lambda x: reference(x, weight, geometry), (x,), (tangent,))
    check_expression("convNd_input_jvp", expected, weight, tangent, **case.options)
    tangent = weight.sin()
    _, expected = torch.func.jvp(lambda w: reference(x, w, geometry), (weight,), (tangent,))
    check_expression("convNd_weight_jvp", expected, x, tangent, **case.options)


@EVERY_CASE
def test_fold(case: ConvCase) -> None:
    fold(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_fold_on_drawn_geometries(case: ConvCase) -> None:
    fold(case)


@EVERY_CASE
def test_toeplitz(case: ConvCase) -> None:
    toeplitz(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_toeplitz_on_drawn_geometries(case: ConvCase) -> None:
    toeplitz(case)


@EVERY_CASE
def test_jvps(case: ConvCase) -> None:
    jvps(case)


@settings(max_examples=50)
@given(case=conv_cases())
def test_jvps_on_drawn_geometries(case: ConvCase) -> None:
    jvps(case)
