"""The rows of the table in docs/mathematics.md on how curvlinops splits constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_moving import KFACLinearOperator, operator, problem

from einconv_kfac import kronecker_factors

POSITIONS = {"0": 4, "3": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_of_curvlinops(reduction: str, approximation: Any) -> None:
    given = problem(reduction)
    ours = kronecker_factors(*given, fisher="exact", approximation=approximation)
    theirs = operator(KFACLinearOperator, *given, kfac_approx=approximation)
    assert theirs.trace > 0  # computes the factors
    for name, block in ours.items():
        split = POSITIONS[name] if approximation == "expand" else 1
        torch.testing.assert_close(theirs._input_covariances[name], block.A[0] / split)
        scaled = block.B[0] * split * block.scale
        torch.testing.assert_close(theirs._gradient_covariances[name], scaled)
        assert block.scale == (6 if reduction == "sum" else 1)
