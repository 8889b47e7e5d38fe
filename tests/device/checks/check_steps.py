"""Steps of the optimizer: those of the processor, without mixtures, within budgets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer, train

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
FIXED = {"adaptive": False, "lr": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": FIXED,
    "fixed-nesterov": {
        **FIXED,
        "nesterov": True,
        "kl_clip": 1e-2,
        "max_step_norm": 0.1,
        "weight_decay": 1e-3,
    },
    "automatic": {},
    "automatic-decay": {"safeguard": True, "weight_decay": 1e-3},
    "exact": {"inverse": "exact"},
    "ekfac": {"inverse": "ekfac"},
    "reduce": {"approximation": "reduce"},
    "fractions": {**FIXED, "factor_fraction": 0.5},
}

BUDGETS = {  # launches, waits
    ("fixed", "ordinary"): (71, 1),
    ("fixed", "factors"): (222, 1),
    ("fixed", "inverses"): (461, 3),
    ("automatic", "ordinary"): (155, 5),
    ("automatic", "factors"): (301, 4),
    ("automatic", "inverses"): (702, 9),
}
"""What a step of a model with four layers may ask of the device, with both passes.

Lower these numbers when they are undercut.
"""


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_processor(name: str) -> None:
    """Without sampled targets, whose generator is another one on each device."""
    periods = {"factor_update_period": 2, "inverse_update_period": 4}
    options = {"fisher": "exact", **periods, **OPTIONS[name]}
    here, data = network(), batches(5)
    there = copy.deepcopy(here)
    if "factor_fraction" in options:
        options["fisher"] = "empirical"
    expected = train(here, optimizer(here, **options), data)
    with simulated() as record:
        there = to_device(there)
        data = [(to_device(x), to_device(y)) for x, y in data]
        found = train(there, optimizer(there, **options), data)
        assert not record.mixtures
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **TOLERANCE)
    for own, other in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(held(other), own, **TOLERANCE)


def kind_of(step: int, periods: tuple[int, int]) -> str:
    return "ordinary" if step % periods[0] else "inverses" if step % periods[1] == 0 else "factors"


@pytest.mark.parametrize("step_rule", ["fixed", "automatic"])
def test_steps_stay_within_their_budgets(step_rule: str) -> None:
    periods = (5, 10)
    asked: dict[str, list[tuple[int, int]]] = {}
    with simulated() as record:
        model = to_device(network(torch.float32))
        options = {**OPTIONS[step_rule], "factor_update_period": 5, "inverse_update_period": 10}
        opt = optimizer(model, **options)
        loss_fn = opt.loss_fn
        state = opt.state_dict()
        state["kfac"]["preconditioner"]["steps"] = 1000  # periods are shorter at first
        opt.load_state_dict(state)
        for step, batch in enumerate(batches(21, torch.float32)):
            opt.zero_grad()
            x, y = map(to_device, batch)
            record.reset()
            loss = loss_fn(model(x), y)
            loss.backward()
            opt.step()
            assert not record.mixtures
            if step > 5:  # the first steps try dampings
                own = record.launches, record.waited
                asked.setdefault(kind_of(step, periods), []).append(own)
    assert set(asked) == {"ordinary", "factors", "inverses"}
    for kind, found in asked.items():
        launches, waits = (max(column) for column in zip(*found))
        most = BUDGETS[step_rule, kind]
        assert launches <= most[0], (kind, launches)
        assert waits <= most[1], (kind, waits)
