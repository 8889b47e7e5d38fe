"""Models that `fully_shard` divides are trained as whole ones; other divisions are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_cases import conv_net
from sharded_cases import FAILURES, MODES, REFUSED, SCRIPTS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from worker_processes import run_workers

from einconv_kfac import KFAC

SIZE, TOLERANCE = 2, 1e-12
NUMBERS = 1e-8
"""Relative difference of statistics: a condition number multiplies rounding."""


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """What each worker found."""
    return run_workers("sharded_cases.results", 1, SIZE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", [script.__name__ for script in SCRIPTS])
def test_scripts_do_the_same_with_divided_models(script: str, mode: str, found: Any) -> None:
    name = f"{script}, {mode}"
    (expected,) = (own["scripts"][name] for own in found[1])
    for own in found[SIZE]:
        result = own["scripts"][name]
        assert float((result["weights"] - expected["weights"]).abs().max()) < TOLERANCE
        assert_close(result["statistics"], expected["statistics"])
        assert result["layers"].keys() == expected["layers"].keys()
        for layer, numbers in expected["layers"].items():
            assert_close(result["layers"][layer], numbers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", [script.__name__ for script in SCRIPTS])
def test_workers_compute_the_same_to_the_bit(script: str, mode: str, found: Any) -> None:
    first, *others = (own["scripts"][f"{script}, {mode}"] for own in found[SIZE])
    for other in others:
        assert repr(other["statistics"]) == repr(first["statistics"])
        assert repr(other["layers"]) == repr(first["layers"])


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    """Numbers of the same names are the same."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = math.isclose(found[name], value, rel_tol=NUMBERS, abs_tol=NUMBERS)
        assert same or (math.isnan(value) and math.isnan(found[name])), name


def test_each_worker_has_its_rows_of_parameters_and_momentum(found: Any) -> None:
    for name, parameter in conv_net().named_parameters():
        rows = [own["rows"][name] for own in found[SIZE]]
        for rank, own in enumerate(rows):
            expected = parameter.chunk(SIZE)[rank].shape
            assert len(own) == 2
            assert own == [(True, expected)] * 2


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_of_one_worker_ends_the_step_on_all(failure: str, found: Any) -> None:
    first, second = (own["failures"][failure] for own in found[SIZE])
    assert "got an error on worker 1 of 2, RuntimeError: out of memory" in first["error"]
    assert second["error"] == "out of memory"
    assert first["unchanged"]
    assert second["unchanged"]
    assert torch.equal(first["weights"], second["weights"])


MESSAGES = {
    "layers alone": "got a DTensor for '0.weight' though `fully_shard` was not called on the Seq",
    "tensor parallel": "got a DTensor for '0.weight' though `fully_shard` was not called on the S",
    "ignored": "got '0.weight', which each worker has for itself. Leave out `ignored_params`.",
    "hybrid": "(hybrid sharding or tensor parallelism). Call `fully_shard` on the layers",
    "columns": "must divide the rows of parameters among all workers, got (Shard(dim=1)",
    "low precision": "without `mp_policy`, got one for '', which replaces parameters",
    "other outputs": "without `mp_policy`, got one for '', which replaces parameters",
    "offloaded": "without `offload_policy`, got one for ''",
    "preconditioner": "KFACPreconditioner must be whole tensors, got a DTensor for '0.weight'",
    "factors": "kronecker_factors must be whole tensors, got a DTensor for '0.weight'",
}


def test_a_part_of_the_workers_after_the_forward_pass_is_refused() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        model = fully_shard(conv_net(), mesh=mesh, reshard_after_forward=2)
        with pytest.raises(ValueError, match="must be True or False, got a number for ''"):
            KFAC(model, nn.CrossEntropyLoss())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [*REFUSED, "preconditioner", "factors"])
def test_other_divisions_are_refused(kind: str, found: Any) -> None:
    for own in found[SIZE]:
        assert MESSAGES[kind] in own["refused"][kind]
