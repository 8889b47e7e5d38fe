"""Workers whose losses have other weights train as one that accumulates them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from uneven_cases import BASIC, MODES, PARTS, SIZE, UNRECORDED, WEIGHTS
from worker_processes import run_workers

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    """The results of all processes."""
    return run_workers("uneven_cases.results", 1, SIZE)


def of(weights: str, found: list[dict[str, Any]]) -> list[list[Any]]:
    """The results of each worker for the same weights."""
    return [[own[name] for name in own if name.startswith(weights)] for own in found]


@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != "both signs"])
def test_workers_train_as_one_that_accumulates(weights: str, found: Any) -> None:
    (expected,), (first, second) = of(weights, found[1]), of(weights, found[SIZE])
    trained = 0
    for one, own, other in zip(expected, first, second, strict=True):
        if isinstance(one, str):
            assert weights == "negative on all"
            assert own == other == one
            assert "must be minimised when adaptive=True" in one
            continue
        trained += 1
        assert isinstance(own, Tensor), own
        assert torch.equal(own, other)
        moved = (one[-1] - one[0]).abs().max()
        assert float((own - one).abs().max() / moved) < TOLERANCE
    assert trained >= len(MODES if "zero" in weights else BASIC)


def test_weights_of_both_signs_are_refused_as_on_one_worker(found: Any) -> None:
    (expected,), others = of("both signs", found[1]), of("both signs", found[SIZE])
    assert all("of the same sign, got 0.5 and -0.25" in text for text in expected)
    for own in others:
        assert all("of the same sign, got sums over workers of 1 and -0.5" in text for text in own)


@pytest.fixture(scope="module")
def divided() -> dict[int, list[dict[str, Any]]]:
    """The results of all processes for models that are divided."""
    return run_workers("uneven_cases.divided_results", 1, SIZE)


@pytest.mark.parametrize("kind", PARTS)
def test_workers_of_a_sharded_model_may_run_other_passes_for_factors(
    kind: str, divided: Any
) -> None:
    (expected,), (first, second) = of(kind, divided[1]), of(kind, divided[SIZE])
    for one, own, other in zip(expected, first, second, strict=True):
        assert torch.equal(own, other)
        moved = (one[-1] - one[0]).abs().max()
        assert float((own - one).abs().max() / moved) < TOLERANCE


@pytest.fixture(scope="module")
def unrecorded() -> dict[int, list[dict[str, Any]]]:
    """The results of all processes for sharded and other models."""
    return run_workers("uneven_cases.unrecorded_results", 1, SIZE)


@pytest.mark.parametrize("way", UNRECORDED)
def test_one_worker_of_a_sharded_or_wrapped_model_has_no_recorded_loss(
    way: str, unrecorded: Any
) -> None:
    one, (first, second) = unrecorded[1][0][way], [own[way] for own in unrecorded[SIZE]]
    if way.endswith("automatic"):
        assert second.startswith("`step` needs the loss it steps on")
        assert "got an error on worker 1 of 2, RuntimeError: `step` needs the loss" in first
        return
    assert torch.equal(first, second)
    moved = (one[-1] - one[0]).abs().max()
    assert float((first - one).abs().max() / moved) < TOLERANCE
