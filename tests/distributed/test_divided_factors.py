"""Factors that are each on one worker: each layer has one owner, and states are whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net
from ownership_cases import OPTIONS
from torch import nn
from worker_processes import run_workers

from einconv_kfac import KFAC, KFACPreconditioner

SIZE, TOLERANCE = 2, 1e-12
LAYERS = {"0", "2", "5"}


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """What each worker found."""
    return run_workers("ownership_cases.owned", 1, SIZE)


@pytest.mark.parametrize("mode", OPTIONS)
def test_each_layer_has_one_owner(mode: str, found: Any) -> None:
    first, second = (own[f"kept, {mode}, True"]["layers"] for own in found[SIZE])
    assert first | second == LAYERS
    assert not first & second
    assert first
    assert second
    for own in (*found[1], *found[SIZE]):
        assert own[f"kept, {mode}, False"]["layers"] == LAYERS
    assert found[1][0][f"kept, {mode}, True"]["layers"] == LAYERS


@pytest.mark.parametrize("divided", [False, True])
def test_workers_count_the_rows_of_all(divided: bool, found: Any) -> None:
    """The spacing of inversions depends on them, and must be the same."""
    first, second, alone = (
        own[f"kept, fixed, {divided}"]["rows"] for own in (*found[SIZE], *found[1])
    )
    assert first == second == alone
    assert all(first.values())


@pytest.mark.parametrize("mode", OPTIONS)
def test_one_triangle_of_every_factor_is_sent_to_its_owner(mode: str, found: Any) -> None:
    for own in found[SIZE]:
        result = own[f"kept, {mode}, True"]
        triangles = [g * ((d + 1) // 2) * (d + 1) for g, d, _ in result["shapes"]]
        assert result["reduced"] == sum(triangles)
        assert own[f"kept, {mode}, False"]["reduced"] == 0


@pytest.mark.parametrize("mode", OPTIONS)
def test_states_are_those_of_factors_on_all_workers(mode: str, found: Any) -> None:
    first, second = (own[f"kept, {mode}, True"]["state"] for own in found[SIZE])
    assert torch.equal(first, second)
    expected = found[SIZE][0][f"kept, {mode}, False"]["state"]
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=TOLERANCE)


@pytest.mark.parametrize("mode", OPTIONS)
def test_layers_that_are_trained_later_have_owners(mode: str, found: Any) -> None:
    first, second = (own[f"unfrozen, {mode}, True"] for own in found[SIZE])
    assert first["before"] | second["before"] == LAYERS - {"0"}
    assert first["layers"] | second["layers"] == LAYERS
    assert first["before"] <= first["layers"]
    assert second["before"] <= second["layers"]
    assert torch.equal(first["weights"], second["weights"])
    expected = found[1][0][f"unfrozen, {mode}, False"]["weights"]
    assert float((first["weights"] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_inversion_in_background_is_refused(kind: Any) -> None:
    message = "`divide_factors` must be False where inverse_in_background=True, got True"
    with pytest.raises(ValueError, match=message):
        kind(conv_net(), nn.CrossEntropyLoss(), divide_factors=True, inverse_in_background=True)
