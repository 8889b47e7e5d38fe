"""Factors averaged by several workers are those of all their data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factor_cases import KINDS
from worker_processes import run_workers


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """The blocks that each process found."""
    return run_workers("factor_cases.factors", 1, 3)


@pytest.mark.parametrize("kind", [*KINDS, "unused"])
def test_factors_are_those_of_all_data(kind: str, found: Any) -> None:
    first, *others = (own[kind] for own in found[3])
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, found[1][0][kind], rtol=1e-11, atol=1e-13)
