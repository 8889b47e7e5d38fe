"""Factors of rounded inputs and gradients: exact for what was rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from factor_definition import columns, factor
from torch import Tensor

from einconv_kfac.curvature import (
    conv_input_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.curvature.factors.choice import applicable
from einconv_kfac.curvature.factors.problem import Problem

LOW: Any = {"precision": "bfloat16"}
SUMS = 1e-5
"""Relative error of sums in float32."""


def is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).norm() <= SUMS * expected.norm())


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("case", CONV_CASES[::2], ids=case_id)
def test_the_factor_is_that_of_the_rounded_input(case: ConvCase, approximation: str) -> None:
    x = case.input(torch.float32)
    expected = factor(columns(x.bfloat16().double(), case.geometry), approximation, bias=True)
    channels = case.in_channels // case.groups
    problem = Problem(case.geometry, case.batch, channels, torch.bfloat16, "cpu")
    names = applicable(problem) if approximation == "expand" else (None,)
    for name in names:
        found = conv_input_factor(
            x,
            case.kernel_size,
            **case.options,
            approximation=approximation,
            bias=True,
            algorithm=name,
            **LOW,
        )
        assert found.dtype == torch.float32
        assert torch.equal(found, found.mT), name
        assert is_close(found, expected), name
        values = torch.linalg.eigvalsh(found.double())
        assert bool((values >= -SUMS * values.amax(-1, keepdim=True)).all()), name


def test_other_factors_are_those_of_rounded_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, 7, generator=generator)
    x = torch.randn(3, 2, 6, generator=generator)
    g = torch.randn(2, 3, 5, 4, generator=generator)
    pairs = [
        (linear_input_factor(a, **LOW), linear_input_factor(a.bfloat16().double())),
        (
            conv_transpose_input_factor(x, 3, stride=2, **LOW),
            conv_transpose_input_factor(x.bfloat16().double(), 3, stride=2),
        ),
        (output_factor(g, 2, **LOW), output_factor(g.bfloat16().double(), 2)),
    ]
    for found, expected in pairs:
        assert torch.equal(found, found.mT)
        assert is_close(found, expected)
        assert not torch.equal(found.double(), expected)


def test_full_precision_is_the_default() -> None:
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(conv_input_factor(x, 3), conv_input_factor(x, 3, precision="full"))
    assert not torch.equal(conv_input_factor(x, 3), conv_input_factor(x, 3, **LOW))


def test_wrong_precisions() -> None:
    x, wrong = torch.ones(3, 2, 6), dict[str, Any](precision="half")
    rule = r"`precision` must be one of \('full', 'bfloat16'\), got 'half'"
    for call in (
        lambda: conv_input_factor(x, 3, **wrong),
        lambda: linear_input_factor(x, **wrong),
        lambda: output_factor(x.unsqueeze(0), **wrong),
    ):
        with pytest.raises(ValueError, match=rule):
            call()
    with pytest.raises(ValueError, match=r"must be 'full' for tensors in float64.*Convert them"):
        linear_input_factor(x.double(), **LOW)
