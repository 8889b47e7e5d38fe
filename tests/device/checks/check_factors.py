"""Factors of single layers: values, symmetry, no waits, no mixtures, and budgets of launches."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase
from factor_definition import columns, factor
from simulated_device import held, simulated, to_device

from einconv_kfac.curvature import conv_input_factor, linear_input_factor
from einconv_kfac.curvature.factors import conv_output_factor
from einconv_kfac.curvature.factors.choice import applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import conv_geometry

TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}

BUDGETS = {  # input channels, size, kernel, stride, padding, groups: launches
    "stem": ((3, 224, 7, 2, 3, 1), 100),
    "3x3": ((64, 56, 3, 1, 1, 1), 104),
    "3x3-wide": ((512, 7, 3, 1, 1, 1), 54),
    "3x3-strided": ((128, 56, 3, 2, 1, 1), 232),
    "1x1": ((256, 14, 1, 1, 0, 1), 4),
    "1x1-strided": ((256, 56, 1, 2, 0, 1), 4),
    "depthwise": ((144, 56, 3, 1, 1, 144), 124),
    "grouped": ((128, 56, 3, 1, 1, 32), 214),
    "patches": ((3, 224, 16, 16, 0, 1), 6),
}
"""Launches of a factor of layers of real networks, batch 64; lower them when they are undercut."""


CASES = [
    *((case, torch.float64) for case in CONV_CASES),
    *((case, dtype) for case in CONV_CASES[::7] for dtype in TYPES if dtype != torch.float64),
]


@pytest.mark.parametrize(
    ("case", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
def test_factors_are_those_of_the_definition(case: ConvCase, dtype: torch.dtype) -> None:
    x = case.input().to(dtype)
    expected = factor(columns(x.double(), case.geometry), "expand", bias=True)
    problem = Problem(case.geometry, case.batch, case.in_channels // case.groups, dtype, "cuda")
    hyper = {"kernel_size": case.kernel_size, **case.options}
    for algorithm in applicable(problem):
        with simulated() as record:
            moved = to_device(x)
            record.reset()
            found = conv_input_factor(moved, bias=True, algorithm=algorithm, **hyper)
            assert not record.waits, algorithm
            assert not record.mixtures, algorithm
        found = held(found)
        assert torch.equal(found, found.mT), algorithm
        error = (found.double() - expected).norm() / expected.norm()
        assert error < TYPES[dtype], (algorithm, float(error))


@pytest.mark.parametrize("layer", BUDGETS)
def test_factors_stay_within_their_budgets(layer: str) -> None:
    (channels, size, kernel, stride, padding, groups), most = BUDGETS[layer]
    geometry = conv_geometry((size, size), kernel, stride, padding, groups=groups)
    problem = Problem(geometry, 64, channels // groups, torch.float32, "cuda")
    name = choose(problem)
    with simulated(shapes_only=True) as record:
        x = to_device(torch.empty(64, channels, size, size))
        record.reset()
        conv_input_factor(x, kernel, stride, padding, groups=groups)
        found = record.launches, record.waited
    assert found[1] == 0
    assert found[0] <= most, (name, found)


def test_other_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, 40, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 6, 8, 3, 3, generator=generator, dtype=torch.float64)
    with simulated() as record:
        there_a, there_g = to_device(a), to_device(g)
        record.reset()
        found = [
            *(linear_input_factor(there_a, name, bias=True) for name in ("expand", "reduce")),
            *(conv_output_factor(there_g, 4, name) for name in ("expand", "reduce")),
        ]
        assert not record.waits
        assert not record.mixtures
        launches = record.launches
    expected = [
        *(linear_input_factor(a, name, bias=True) for name in ("expand", "reduce")),
        *(conv_output_factor(g, 4, name) for name in ("expand", "reduce")),
    ]
    for ours, theirs in zip(expected, found):
        torch.testing.assert_close(held(theirs), ours, rtol=1e-12, atol=1e-12)
    assert launches <= 26
