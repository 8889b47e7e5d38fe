"""Several workers train as one worker that accumulates their batches."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worker_cases import CASES, Case, cases_of
from worker_processes import run_workers
from worker_training import results_of, trained, trained_whole

TOLERANCE = 1e-12


def results(rank: int, size: int) -> dict[str, Any]:
    """What one of the processes finds, for every case."""
    warnings.simplefilter("ignore")
    if size > 1:
        return results_of(lambda case: trained(case, rank, size), cases_of(size))
    whole = {name: case for name, case in CASES.items() if case.whole}
    accumulated = results_of(Alone(), cases_of(size))
    return {"accumulated": accumulated, "whole": results_of(trained_whole, whole)}


class Alone:
    """Trains cases with one worker, to whom those that differ in their workers alone are equal."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def __call__(self, case: Case) -> Tensor:
        options = {k: v for k, v in case.options.items() if k != "divide_factors"}
        for_several = {"wrapper": None, "compiled": "", "workers": (), "sharded": False}
        alone = replace(case, options=options, whole=False, **for_several)
        if (key := repr(alone)) not in self.found:
            self.found[key] = trained(alone)
        return self.found[key]


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """The results of all processes."""
    return run_workers("test_equality.results", 1, 2, 4)


def parameters(result: Any) -> Tensor:
    """The parameters after each step; fails where there was an error."""
    assert isinstance(result, Tensor), result
    return result


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to how far the parameters moved."""
    return float((found - expected).abs().max() / (expected[-1] - expected[0]).abs().max())


@pytest.mark.parametrize(("name", "size"), [(n, s) for n, c in CASES.items() for s in c.workers])
def test_workers_train_as_one(name: str, size: int, found: dict[int, list[Any]]) -> None:
    own = [parameters(result[name]) for result in found[size]]
    assert all(torch.equal(own[0], other) for other in own[1:])
    if CASES[name].whole_options is not None:
        return
    expected = parameters(found[1][0]["accumulated"][name])
    assert error(own[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
def test_workers_train_as_one_with_the_whole_batch(name: str, found: dict[int, list[Any]]) -> None:
    expected = parameters(found[1][0]["whole"][name])
    assert error(parameters(found[CASES[name].workers[-1]][0][name]), expected) < TOLERANCE
