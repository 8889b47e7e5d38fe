"""Arguments and expected results of the expressions of a case, and checks of expressions."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import CONV_CASES, HIGH_CASES, UNMET, ConvCase, case_id
from oracles import contracted, reference, unfolded
from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.network import Network, simplified

EVERY_CASE = pytest.mark.parametrize("case", [*CONV_CASES, *HIGH_CASES, UNMET], ids=case_id)

OPERATIONS = [
    "convNd_forward",
    "convNd_unfold",
    "convNd_input_vjp",
    "convNd_weight_vjp",
    "convNd_kfc",
    "convNd_kfac_reduce",
]
ALL_OPERATIONS = pytest.mark.parametrize("operation", OPERATIONS)


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


def expression_of(operation: str, *arguments: Any, **keywords: Any) -> Any:
    module = import_module(f"einconv_kfac.expressions.{operation}")
    return module.einsum_expression(*arguments, **keywords)


def check_expression(operation: str, expected: Tensor, *arguments: Any, **keywords: Any) -> None:
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
