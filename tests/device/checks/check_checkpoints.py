"""Training that goes on on another device, and batches that are not finite."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from simulated_device import DeviceTensor, held, simulated, to_device
from small_training import batches, network, optimizer, train
from torch.utils._pytree import tree_leaves

OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fixed": {"adaptive": False, "lr": 0.1},
    "ekfac": {"inverse": "ekfac", "adaptive": False, "lr": 0.1},
}
PERIODS = {"factor_update_period": 2, "inverse_update_period": 2}
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def moved(data: Any) -> list[Any]:
    return [(to_device(x), to_device(y)) for x, y in data]


@pytest.mark.parametrize(
    ("name", "to_gpu"),
    [("automatic", True), ("automatic", False), ("fixed", True), ("ekfac", False)],
)
def test_a_checkpoint_of_the_other_device_goes_on(name: str, to_gpu: bool) -> None:
    """With an exact Fisher nothing is drawn, so that the steps are those without the move."""
    options = {"fisher": "exact", **PERIODS, **OPTIONS[name]}
    before, after = batches(4)[:2], batches(4)[2:]
    reference = network()
    expected = train(reference, optimizer(reference, **options), before + after)
    with simulated() as record:
        model = network() if to_gpu else to_device(network())
        opt = optimizer(model, **options)
        train(model, opt, before if to_gpu else moved(before))
        state = held(opt.state_dict())
        other = network()
        other.load_state_dict(held(model.state_dict()))
        other = to_device(other) if to_gpu else other
        resumed = optimizer(other, **options)
        resumed.load_state_dict(state)
        found = train(other, resumed, moved(after) if to_gpu else after)
        assert not record.mixtures
        tensors = [leaf for leaf in tree_leaves(resumed.state) if torch.is_tensor(leaf)]
        assert {type(leaf) is DeviceTensor for leaf in tensors} == {to_gpu}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[2:]), **TOLERANCE)


def test_sampled_targets_go_on_on_the_same_device() -> None:
    with simulated():
        data = moved(batches(2))
        model = to_device(network())
        opt = optimizer(model, **PERIODS)
        train(model, opt, data)
        again = optimizer(copy.deepcopy(model), **PERIODS)
        again.load_state_dict(opt.state_dict())
        train(model, opt, data)
        train(again._model, again, data)
        for one, other in zip(model.parameters(), again._model.parameters()):
            assert torch.equal(held(one), held(other))


@pytest.mark.parametrize("name", ["automatic", "fixed"])
def test_a_batch_that_is_not_finite_is_skipped(name: str) -> None:
    (x, y), *_ = batches(1)
    with simulated() as record, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = to_device(network())
        opt = optimizer(model, **PERIODS, **OPTIONS[name])
        data = moved([(x, y), (x * float("nan"), y), (x, y)])
        train(model, opt, data)
        assert not record.mixtures
        assert all(bool(held(p).isfinite().all()) for p in model.parameters())
