"""Expressions against torch's own operations and einconv 0.1.0."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import CONV_CASES, HIGH_CASES, UNMET, ConvCase, case_id
from drawn_cases import conv_cases
from hypothesis import given, settings
from oracles import contracted, reference, unfolded
from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.network import simplified

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
ALL_CASES = pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])


def arguments(operation: str, case: ConvCase) -> tuple[list[object], dict[str, object]]:
    """The arguments with which einconv and einconv_kfac are called alike."""
    x, weight, v = case.input(), case.weight(), case.output_like()
    kernel, options = case.kernel_size, case.options
    return {
        "convNd_forward": ([x, weight], options),
        "convNd_unfold": ([x, kernel], case.ungrouped),
        "convNd_input_vjp": ([weight, v, case.input_size], options),
        "convNd_weight_vjp": ([x, v, kernel], options),
        "convNd_kfc": ([x, kernel], options),
        "convNd_kfac_reduce": ([x, kernel], options),
    }[operation]


def expected(operation: str, case: ConvCase) -> Tensor:
    """The result according to torch, or to the definition."""
    x, weight, v = case.input(), case.weight(), case.output_like()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return reference(x, weight, case.geometry)

    if operation == "convNd_forward":
        return convolve(x, weight)
    if operation == "convNd_input_vjp":
        return torch.func.vjp(lambda x: convolve(x, weight), x)[1](v)[0]
    if operation == "convNd_weight_vjp":
        return torch.func.vjp(lambda w: convolve(x, w), weight)[1](v)[0]
    columns = unfolded(x, case.geometry)
    if operation == "convNd_unfold":
        return columns.flatten(1, 2)
    if operation == "convNd_kfc":
        return torch.einsum("ngap,ngbp->gab", columns, columns) / case.batch
    mean = columns.mean(-1)
    return torch.einsum("nga,ngb->gab", mean, mean) / case.batch


OPERATIONS = [
    "convNd_forward",
    "convNd_unfold",
    "convNd_input_vjp",
    "convNd_weight_vjp",
    "convNd_kfc",
    "convNd_kfac_reduce",
]
ALL_OPERATIONS = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.mark.parametrize("case", [*CONV_CASES, *HIGH_CASES, UNMET], ids=case_id)
@SIMPLIFY
@ALL_OPERATIONS
def test_expression_equals_torch(operation: str, case: ConvCase, simplify: bool) -> None:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    positional, keywords = arguments(operation, case)
    result = contracted(module.einsum_expression(*positional, **keywords, simplify=simplify))
    torch.testing.assert_close(result, expected(operation, case))


@ALL_CASES
@SIMPLIFY
@ALL_OPERATIONS
def test_expression_equals_einconv(operation: str, case: ConvCase, simplify: bool) -> None:
    ours = import_module(f"einconv_kfac.expressions.{operation}")
    theirs = import_module(f"einconv.expressions.{operation}")
    positional, keywords = arguments(operation, case)
    if (case.name, operation, simplify) == ("3d-dense", "convNd_kfac_reduce", True):
        with pytest.raises(ValueError, match="Ran out of letters"):
            theirs.einsum_expression(*positional, **keywords)
        return
    reference = theirs.einsum_expression(*positional, **keywords, simplify=simplify)
    expression = ours.einsum_expression(*positional, **keywords, simplify=simplify)
    assert expression[2] == reference[2]
    torch.testing.assert_close(contracted(expression), contracted(reference))
    if not simplify:
        assert [list(t.shape) for t in expression[1]][:-1] == [list(t.shape) for t in reference[1]][
            :-1
        ]


@pytest.mark.parametrize("case", [*CONV_CASES, *HIGH_CASES, UNMET], ids=case_id)
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
def test_drawn_expression_equals_torch(operation: str, case: ConvCase) -> None:
    for simplify in (True, False):
        test_expression_equals_torch(operation, case, simplify)
    test_evaluation_equals_torch(operation, case)
