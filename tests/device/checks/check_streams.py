"""Inverses of a background thread in a stream of their own: what is read was written before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer, train

from einconv_kfac.curvature.devices.side_stream import SideStream

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"adaptive": False, "lr": 0.1},
    "automatic": {},
    "exact": {"adaptive": False, "lr": 0.1, "inverse": "exact"},
    "ekfac": {"adaptive": False, "lr": 0.1, "inverse": "ekfac"},
}
PERIODS = {"factor_update_period": 1, "inverse_update_period": 2, "fisher": "exact"}


def test_the_simulation_notes_reads_without_an_event() -> None:
    with simulated() as record:
        x, side = to_device(torch.ones(3)), torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = x * 2  # was written by the host
        assert not record.races
        _ = y + 1
        assert record.races.total() == 1
        record.reset()
        torch.cuda.current_stream().wait_stream(side)
        z = y + 1
        assert not record.races
        with torch.cuda.stream(side):
            _ = z[:2] * 2  # a view
        assert record.races.total() == 1
        record.reset()
        event = torch.cuda.Event()
        event.record()
        side.wait_event(event)
        with torch.cuda.stream(side):
            y.add_(z)
        assert not record.races
        y.tolist()
        assert record.races.total() == 1
        record.reset()
        side.synchronize()
        y.tolist()
        assert not record.races


@pytest.mark.parametrize("name", OPTIONS)
def test_inverses_are_read_after_their_event(name: str) -> None:
    here, data = network(), batches(8)
    there = copy.deepcopy(here)
    options = {**PERIODS, **OPTIONS[name], "inverse_in_background": True}
    own = optimizer(here, **options)
    expected = train(here, own, data)
    with simulated() as record:
        there = to_device(there)
        data = [(to_device(x), to_device(y)) for x, y in data]
        other = optimizer(there, **options)
        found = train(there, other, data[:5])
        state = other.state_dict()["kfac"]["preconditioner"]["layers"]
        assert any(layer["pending"] is not None for layer in state.values())
        found += train(there, other, data[5:])
        other.layer_statistics()
        other.state_dict()  # waits for the thread
        assert not record.races
        assert not record.mixtures
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **TOLERANCE)
    for p, q in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(held(q), p, **TOLERANCE)


@pytest.mark.parametrize("part", ["follow_", "join_"])
def test_without_its_events_the_reads_are_noted(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, part, lambda self, tensors: None)
    with simulated() as record:
        model = to_device(network())
        opt = optimizer(model, **PERIODS, **OPTIONS["fixed"], inverse_in_background=True)
        train(model, opt, [(to_device(x), to_device(y)) for x, y in batches(6)])
        opt.state_dict()  # waits for the thread
        assert record.races
