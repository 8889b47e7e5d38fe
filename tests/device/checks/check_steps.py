"""Steps of the optimizer: those of the processor, without mixtures, within budgets."""

from __future__ import annotations

import copy
from contextlib import nullcontext
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
    "automatic-decoupled": {"decoupled_weight_decay": True, "weight_decay": 1e-2},
    "exact": {"inverse": "exact"},
    "ekfac": {"inverse": "ekfac"},
    "reduce": {"approximation": "reduce"},
    "fractions": {**FIXED, "factor_fraction": 0.5},
}

BUDGETS = {  # launches, waits
    ("fixed", "ordinary"): (69, 0),
    ("fixed", "factors"): (214, 1),
    ("fixed", "inverses"): (400, 1),
    ("automatic", "ordinary"): (179, 0),
    ("automatic", "factors"): (319, 0),
    ("automatic", "inverses"): (606, 1),
}
"""What a step of a model with four layers may ask of the device, with both passes.

Lower these numbers when they are undercut.
"""


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_processor(name: str) -> None:
    """Without sampled targets, whose generator is another one on each device."""
    periods = {"factor_update_period": 2, "inverse_update_period": 4}
    options = {"fisher": "exact", **periods, **OPTIONS[name]}
    here, data = network(), batches(4)
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
        for step, batch in enumerate(batches(16, torch.float32)):
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


ORDINARY: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "decoupled_weight_decay": True, "weight_decay": 1e-2},
    {"fallback": "adam", "exclude": ["0"]},
]


@pytest.mark.parametrize(
    ("options", "value", "is_read"),
    [
        (ORDINARY[0], float("nan"), True),
        (ORDINARY[0], float("inf"), False),
        (ORDINARY[1], float("nan"), False),
        (ORDINARY[2], float("inf"), True),
    ],
)
def test_an_ordinary_step_that_is_not_finite_changes_nothing(
    options: dict[str, Any], value: float, is_read: bool
) -> None:
    """The host reads that later, and then the step does not count; so it is on the processor."""
    periods = {"factor_update_period": 3, "inverse_update_period": 3, "fisher": "exact"}
    options = {**FIXED, **periods, **options}
    data = batches(6)
    results = []
    for is_late in (False, True):
        model = network()
        with simulated() if is_late else nullcontext():
            model = to_device(model) if is_late else model
            opt = optimizer(model, **options)
            state = opt.state_dict()
            state["kfac"]["preconditioner"]["steps"] = 1000  # periods are shorter at first
            opt.load_state_dict(state)
            own = [(to_device(x), to_device(y)) if is_late else (x, y) for x, y in data]
            train(model, opt, own[:2])
            before = [held(p.detach()).clone() for p in model.parameters()]
            memory = [held(t).clone() for t in tensors_of(opt)]
            opt.zero_grad()
            opt.loss_fn(model(own[2][0]), own[2][1]).backward()
            next(iter(model.parameters())).grad.mul_(value)
            expected = pytest.warns(RuntimeWarning, match="not finite")
            with expected if not is_late else nullcontext():
                opt.step()
            for p, old in zip(model.parameters(), before):
                assert torch.equal(held(p.detach()), old)
            for tensor, old in zip(tensors_of(opt), memory):
                assert torch.equal(held(tensor), old)
            if is_late:
                with expected:
                    if is_read:
                        opt.statistics()
                    else:
                        train(model, opt, own[3:4])
            elif not is_read:
                train(model, opt, own[3:4])
            assert opt.state_dict()["kfac"]["preconditioner"]["steps"] == 1003 - is_read
            train(model, opt, own[4:6])
            results.append([held(p.detach()) for p in model.parameters()])
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, **TOLERANCE)


def tensors_of(opt: Any) -> list[Any]:
    return [v for own in opt.state.values() for v in own.values() if isinstance(v, torch.Tensor)]
