"""The evaluator of networks against torch's own operations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from expression_checks import ALL_OPERATIONS, EVERY_CASE, expected
from hypothesis import given, settings

from einconv_kfac.evaluate import evaluate
from einconv_kfac.expressions import convNd_forward, convNd_kfc
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.network import draw, explain, simplified

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own


@EVERY_CASE
@ALL_OPERATIONS
def test_evaluation_equals_torch(operation: str, case: ConvCase) -> None:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    x, weight, v = case.input(), case.weight(), case.output_like()
    tensors = {
        "convNd_forward": (x, weight),
        "convNd_input_vjp": (v, weight),
        "convNd_weight_vjp": (x, v),
    }.get(operation, (x,))
    channels = (case.in_channels, case.out_channels)[: len(tensors)]
    network = module.network(case.geometry, case.batch, *channels)
    torch.testing.assert_close(evaluate(network, *tensors), expected(operation, case))
    torch.testing.assert_close(evaluate(simplified(network), *tensors), expected(operation, case))


@ALL_OPERATIONS
@settings(max_examples=50)
@given(case=conv_cases())
def test_drawn_evaluation_equals_torch(operation: str, case: ConvCase) -> None:
    test_evaluation_equals_torch(operation, case)


GEOMETRY = conv_geometry((8,), kernel_size=2, stride=3)
NETWORK = convNd_forward.network(GEOMETRY, 2, 4, 6)
X, W = torch.rand(2, 4, 8), torch.rand(6, 4, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.rand(2, 4, 9), W), r"`x` must have the shape \[2, 4, 8\] .*, got \[2, 4, 9\]"),
        ((X, torch.rand(6, 4, 2, 1)), r"`W` must have the shape \[6, 4, 2\]"),
        ((X,), r"`tensors` must be \['x', 'W'\] of the network, got 1"),
        ((X, W, W), r"`tensors` must be \['x', 'W'\] of the network, got 3"),
        ((), r"`tensors` must be \['x', 'W'\] of the network, got 0"),
        ((X, W.double()), r"`W` must be torch.float32 on cpu, .* got torch.float64"),
        ((X, W.to("meta")), r"`W` must be torch.float32 on cpu, .* on meta"),
    ],
)
def test_tensors_of_another_network_are_refused(tensors: Any, message: str) -> None:
    for network in (NETWORK, simplified(NETWORK)):
        with pytest.raises(ValueError, match=message):
            evaluate(network, *tensors)


def test_other_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`x` must be of floating-point .* 1/2, got torch.int64"):
        evaluate(convNd_kfc.network(GEOMETRY, 2, 4), X.long())
    with pytest.raises(TypeError, match=r"`x` must be a tensor, got \[1\]"):
        evaluate(NETWORK, [1], W)
    for function in (evaluate, simplified, explain, draw):
        with pytest.raises(TypeError, match="`network` must be a `Network`, got 3"):
            function(3)
