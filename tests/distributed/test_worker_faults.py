"""What goes wrong on one worker ends the step on all of them, and none of them hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fault_cases import FAULTS
from worker_processes import run_workers

SIZE = 3
SKIPPED = "was not finite; the step was skipped."
OF_ANOTHER = "A loss, gradient or Kronecker factor of another worker"
NOT_FINITE = {
    "not_finite": ["The gradient of '0.weight'", "The loss", "The gradient of '0.weight'"],
    "not_finite_moments": [OF_ANOTHER, "A Kronecker factor of '5'", OF_ANOTHER],
}
"""What each worker finds; gradients are those of all."""
REMOTE = (
    "WorkersError: The step must succeed on all workers, got an error on worker 2 of 3, "
    "RuntimeError: out of memory."
)
LATE = "WorkersError: The last step must have been taken by all workers, got an error on worker 2"


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """What each worker saw, by fault."""
    (results,) = run_workers("fault_cases.faults", SIZE).values()
    return {fault.__name__: [own[fault.__name__] for own in results] for fault in FAULTS}


def assert_equal_weights(results: list[dict[str, Any]]) -> None:
    """All workers have the same parameters, to the bit."""
    first, *others = (own["weights"] for own in results)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("fault", NOT_FINITE)
def test_all_workers_skip_a_step_that_is_not_finite_on_one(fault: str, found: Any) -> None:
    for own, name in zip(found[fault], NOT_FINITE[fault], strict=True):
        assert own["warnings"] == [f"{name} {SKIPPED}"]
        assert own["unchanged"]
    if "weights" in found[fault][0]:
        assert_equal_weights(found[fault])


@pytest.mark.parametrize(
    "fault",
    [
        "failing_early",
        "failing_in_update",
        "failing_in_replay",
        "failing_in_inversion",
        "failing_in_divided_inversion",
    ],
)
def test_an_error_of_one_worker_ends_the_step_on_all(fault: str, found: Any) -> None:
    errors = [own["step"] for own in found[fault]]
    assert errors == [REMOTE, REMOTE, "RuntimeError: out of memory"]
    assert all(own["unchanged"] for own in found[fault])
    assert all("next" not in own for own in found[fault])
    assert_equal_weights(found[fault])


def test_an_error_after_the_others_took_the_step_is_one_of_the_next_on_all(found: Any) -> None:
    *others, failed = found["failing_late"]
    assert failed["step"] == "RuntimeError: out of memory"
    assert failed["unchanged"]
    assert all("step" not in own and not own["unchanged"] for own in others)
    assert all(own["next"].startswith(LATE) for own in found["failing_late"])


def test_differing_optimizers_are_refused_with_the_first_difference(found: Any) -> None:
    for own in found["other_settings"]:
        assert "same `factor_decay`, got 0.95 on worker 0 and 0.9 on worker 1." in own["settings"]
        assert "same `seed`, got 0 on worker 0 and 1 on worker 1." in own["seed"]
        assert "same `damping`, got 0.1 on worker 0 and 0.2 on worker 1." in own["preconditioner"]
        assert "same parameters, got " in own["model"]
        assert "same `lr` of group 0, got 0.05 on worker 0 and 0.1 on worker 1." in own["groups"]
    first, second, third = (own["constructor"] for own in found["other_settings"])
    assert first == third
    assert "error on worker 1 of 3, ValueError: " in first
    assert second.startswith("ValueError: ")
    assert_equal_weights(found["other_settings"])


def test_gradients_that_were_not_averaged_are_refused(found: Any) -> None:
    for own in found["not_averaged"]:
        for mode in ("fixed", "automatic"):
            assert "All workers must have the same gradients" in own[mode]
            assert own[f"{mode} unchanged"]


def test_differing_parameters_are_refused(found: Any) -> None:
    for own in found["other_parameters"]:
        assert "All workers must have the same parameters" in own["step"]


def test_steps_of_other_optimizers_are_refused(found: Any) -> None:
    for own in found["other_steps"]:
        assert "All workers must have the same `" in own["order"]
        assert "WorkersError: " in own["class"]


def test_an_automatic_step_without_a_batch_on_one_worker_is_refused(found: Any) -> None:
    for own in found["without_batch"]:
        assert "`step` needs the loss it steps on, but saw none" in own["step"]


def test_a_state_of_one_worker_whose_factors_are_divided_is_refused(found: Any) -> None:
    for own in found["state_of_one"]:
        assert "WorkersError: The workers must do the same in each step, got " in own["state"]
        assert "the factors of a state" in own["state"]
        assert own["unchanged"]
    assert_equal_weights(found["state_of_one"])


def test_steps_inside_of_join_are_refused(found: Any) -> None:
    for own in found["joined"]:
        for name, owner in (("step", "KFAC"), ("preconditioner", "KFACPreconditioner")):
            assert own[name].startswith(f"RuntimeError: Steps of {owner} must be taken by all work")
            assert "`DistributedSampler`" in own[name]
    assert_equal_weights(found["joined"])


@pytest.mark.parametrize("case", ["killed", "killed_with_divided_factors", "stopped"])
def test_workers_end_when_one_of_them_is_lost(case: str) -> None:
    """A killed one is noticed at once, and one that hangs after the timeout of the group."""
    (results,) = run_workers(f"fault_cases.{case}", 4).values()
    assert results.pop(1) is None
    for own in results:
        assert own["step"].startswith("WorkersError: All workers must be reached, got ")
