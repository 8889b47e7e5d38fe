"""The evaluator of networks against torch's own operations."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from expression_checks import ALL_OPERATIONS, EVERY_CASE, expected
from hypothesis import given, settings

from einconv_kfac.evaluate import evaluate
from einconv_kfac.network import simplified

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
