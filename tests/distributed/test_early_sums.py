"""Factors are sent before the backward pass, and nothing that comes in between does any harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from early_cases import INTERRUPTIONS, MODES
from worker_processes import run_workers

SIZE = 2


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each worker found."""
    (results,) = run_workers("early_cases.early", SIZE).values()
    return results


@pytest.mark.parametrize("mode", MODES)
def test_sums_begin_before_the_first_gradients_are_averaged(mode: str, found: Any) -> None:
    for own in found:
        events = own[f"order, {mode}"]
        assert set(events) == {"sums", "gradients", "step"}
        last = len(events) - 1 - events[::-1].index("sums")
        assert last < events.index("gradients") < events.index("step")


CASES = [
    (mode, what.__name__)
    for mode in ("fixed", "divided")
    for what in INTERRUPTIONS
    if (mode, what.__name__) != ("divided", "loaded_by_one")
]


@pytest.mark.parametrize(("mode", "what"), CASES)
def test_steps_are_those_without_early_sums_to_the_bit(mode: str, what: str, found: Any) -> None:
    for own in found:
        late, early = (own[f"{mode}, {what}, {is_early}"] for is_early in (False, True))
        assert torch.equal(late["weights"], early["weights"])
        assert torch.equal(early["weights"], found[0][f"{mode}, {what}, True"]["weights"])


@pytest.mark.parametrize(("mode", "what"), CASES)
def test_all_workers_have_begun_as_many(mode: str, what: str, found: Any) -> None:
    first, second = (own[f"{mode}, {what}, True"] for own in found)
    assert first["begun"] == second["begun"] > found[0][f"{mode}, {what}, False"]["begun"]
