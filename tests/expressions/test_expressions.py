"""Expressions against torch's own operations and einconv 0.1.0."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from drawn_cases import conv_cases
from expression_checks import ALL_OPERATIONS, EVERY_CASE, arguments, expected
from hypothesis import given, settings
from oracles import contracted

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
ALL_CASES = pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])


@EVERY_CASE
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


@ALL_OPERATIONS
@settings(max_examples=50)
@given(case=conv_cases())
def test_drawn_expression_equals_torch(operation: str, case: ConvCase) -> None:
    for simplify in (True, False):
        test_expression_equals_torch(operation, case, simplify)
