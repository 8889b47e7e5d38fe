"""Losses of different weights in one step: those of the processor, and no wait for the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer
from torch import Tensor, nn

TOLERANCE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
FIXED: dict[str, Any] = {"adaptive": False, "lr": 0.1}
SLICES = (slice(0, 20), slice(20, 33), slice(33, 40))
Step = Sequence[tuple[Tensor, Tensor]]


def train(model: nn.Module, opt: Any, data: Step, weights: Sequence[float]) -> None:
    for x, y in data:
        opt.zero_grad()
        for rows, weight in zip(SLICES, weights):
            (weight * opt.loss_fn(model(x[rows]), y[rows])).backward()
        opt.step()


def factors_of(opt: Any) -> list[Tensor]:
    layers = opt.state_dict()["kfac"]["preconditioner"]["layers"].values()
    return [held(own) for layer in layers for own in layer["factors"]]


OPTIONS: list[dict[str, Any]] = [
    FIXED,
    {},
    {**FIXED, "inverse": "ekfac"},
    {**FIXED, "fisher": "empirical"},
]


@pytest.mark.parametrize(
    ("options", "weights"),
    [*((options, (0.5, 0.3, 0.2)) for options in OPTIONS), (OPTIONS[1], (1.0, 1.0, 1.0))],
)
def test_weights_are_those_of_the_processor(
    options: dict[str, Any], weights: tuple[float, ...]
) -> None:
    options = {"fisher": "exact", "factor_update_period": 1, **options}
    here, data = network(), batches(2)
    there = copy.deepcopy(here)
    train(here, opt := optimizer(here, **options), data, weights)
    expected = factors_of(opt)
    with simulated() as record:
        there = to_device(there)
        data = [(to_device(x), to_device(y)) for x, y in data]
        train(there, opt := optimizer(there, **options), data, weights)
        assert not record.mixtures
    for own, other in zip(factors_of(opt), expected):
        torch.testing.assert_close(own, other, **TOLERANCE)
    for parameter, like in zip(there.parameters(), here.parameters()):
        torch.testing.assert_close(held(parameter), like, **TOLERANCE)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_weight_of_zero_mixes_no_devices(options: dict[str, Any]) -> None:
    """The inputs of its loss count on a device, as they do not on the processor."""
    options = {"fisher": "exact", "factor_update_period": 1, **options}
    with simulated() as record:
        model, data = to_device(network()), [(to_device(x), to_device(y)) for x, y in batches(2)]
        train(model, optimizer(model, **options), data, (0.2, 0.0, 2.0))
        assert not record.mixtures


@pytest.mark.parametrize("weights", [(0.2, 0.0, 2.0), (0.0, 0.5, 2.0)])
def test_a_loss_of_weight_zero_has_no_part_in_output_factors(weights: tuple[float, ...]) -> None:
    found = []
    for is_there in (False, True):
        model, data = network(), batches(1)
        with simulated():
            if is_there:
                model, data = to_device(model), [(to_device(x), to_device(y)) for x, y in data]
            opt = optimizer(model, fisher="exact", **FIXED)
            train(model, opt, data, weights)
            found.append(factors_of(opt)[1::2])
    for own, other in zip(*found):
        torch.testing.assert_close(own, other, **TOLERANCE)


def test_the_host_does_not_wait_for_weights() -> None:
    waits = []
    for count in (1, 3):
        with simulated() as record:
            model = to_device(network(torch.float32))
            opt = optimizer(model, factor_update_period=1, inverse_update_period=100, **FIXED)
            state = opt.state_dict()
            state["kfac"]["preconditioner"]["steps"] = 1000  # periods are shorter at first
            opt.load_state_dict(state)
            data = [tuple(map(to_device, own)) for own in batches(5, torch.float32)]
            train(model, opt, data[:3], (0.5, 0.3, 0.2)[:count])  # type: ignore[arg-type]
            record.reset()
            train(model, opt, data[3:], (0.5, 0.3, 0.2)[:count])  # type: ignore[arg-type]
            waits.append(record.waited)
    assert waits[0] == waits[1]


def test_weights_of_both_signs_skip_the_step() -> None:
    with simulated():
        model = to_device(network())
        opt = optimizer(model, fisher="exact", **FIXED)
        before = [held(p.detach()).clone() for p in model.parameters()]
        data = [tuple(map(to_device, own)) for own in batches(1)]
        with pytest.warns(RuntimeWarning, match="ratio of two losses' weights.*same sign"):
            train(model, opt, data, (0.5, -0.3, 0.2))  # type: ignore[arg-type]
        for parameter, old in zip(model.parameters(), before):
            assert torch.equal(held(parameter.detach()), old)
