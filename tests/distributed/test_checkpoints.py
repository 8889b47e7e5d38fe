"""Training goes on from a distributed checkpoint with any number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_cases import CASES
from worker_processes import run_workers

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of four workers found."""
    (results,) = run_workers("checkpoint_cases.checkpoints", 4).values()
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_whole_state(name: str, found: Any) -> None:
    first, *others = (own[name]["state"] for own in found)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", CASES)
def test_as_many_workers_go_on_bit_by_bit(name: str, found: Any) -> None:
    """In turn from an optimizer that has taken a step, and from one that has taken none."""
    for own in found:
        assert torch.equal(own[name]["again"], own[name]["whole"])


@pytest.mark.parametrize("name", CASES)
def test_four_workers_go_on_as_two_and_as_one(name: str, found: Any) -> None:
    whole = found[0][name]["whole"]
    assert float((found[0][name]["one"] - whole).abs().max()) < TOLERANCE
