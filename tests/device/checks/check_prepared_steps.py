"""Automatic steps that are begun before the host has read whether they are taken.

Of ordinary steps the update is computed ahead, of others the quadratic model.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}
OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "decay": {"weight_decay": 1e-2},
    "decoupled": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "damping": {"damping": 0.3},
    "rates": {"lr": 0.5},
    "small-layers-joined": {"exclude": ["0"]},
}


def late(model: nn.Module, **options: Any) -> Any:
    """Return an optimizer late in training, when most steps are ordinary ones."""
    opt = optimizer(model, fisher="exact", factor_update_period=7, **options)
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000
    opt.load_state_dict(state)
    return opt


def step(model: nn.Module, opt: Any, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
    opt.zero_grad()
    (factor * opt.loss_fn(model(x), y)).backward()
    opt.step()


def tensors(state: Any) -> list[Tensor]:
    """Return copies of all tensors and numbers in nested containers, on the host."""
    if isinstance(state, dict):
        return [tensor for key in sorted(state, key=str) for tensor in tensors(state[key])]
    if isinstance(state, (list, tuple)):
        return [tensor for each in state for tensor in tensors(each)]
    if isinstance(state, Tensor):
        return [held(state.detach()).double().clone()]
    return [torch.tensor(state).double()] if isinstance(state, (int, float)) else []


def compare(here: nn.Module, there: nn.Module, own: Any, other: Any) -> None:
    for p, q in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(held(q.detach()), p.detach(), **TOLERANCE)
    numbers, found = own.statistics(), other.statistics()
    assert numbers.keys() == found.keys()
    for name, value in numbers.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name
    states = [tensors(opt.state_dict()["kfac"]["automatic"]) for opt in (own, other)]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_they_are_those_of_the_processor(name: str) -> None:
    """Within the bound on the layers' outputs and beyond it, with each kind of number."""
    here = network()
    there, data = copy.deepcopy(here), batches(14)
    own = late(here, **OPTIONS[name])
    for x, y in data:
        step(here, own, x, y)
    with simulated() as record:
        there = to_device(there)
        other, waits = late(there, **OPTIONS[name]), []
        for x, y in [(to_device(x), to_device(y)) for x, y in data]:
            record.reset()
            step(there, other, x, y)
            waits.append(record.waited)
        assert not record.mixtures
        assert waits.count(0) > len(waits) / 2
        compare(here, there, own, other)


@pytest.mark.parametrize(("factor", "at"), [(1e6, 4), (30.0, 4), (1e-3, 4), (1e6, 10)])
def test_numbers_that_ask_for_another_step_get_it(factor: float, at: int) -> None:
    """An objective that explodes undoes the last step; another slope asks for a fit.

    The step numbered 10 is due to be fitted.
    """
    here = network()
    there, data = copy.deepcopy(here), batches(at + 2)
    factors = [1.0] * at + [factor, 1.0]
    own = late(here)
    for (x, y), each in zip(data, factors):
        step(here, own, x, y, each)
    with simulated():
        there = to_device(there)
        other = late(there)
        for (x, y), each in zip(data, factors):
            step(there, other, to_device(x), to_device(y), each)
        compare(here, there, own, other)


@pytest.mark.parametrize(
    ("value", "match", "count"),
    [(float("nan"), "not finite", 3), (float("nan"), "not finite", 10), (-1.0, "negative", 10)],
)
def test_a_step_that_is_not_taken_changes_nothing(value: float, match: str, count: int) -> None:
    """Neither an ordinary one nor one that is fitted, inverts factors and is compared."""
    with simulated():
        model, data = to_device(network()), batches(count + 1)
        opt = late(model, inverse_update_period=10)
        for x, y in data[:-1]:
            step(model, opt, to_device(x), to_device(y))
        before = tensors([[*model.parameters()], opt.state_dict()])
        x, y = map(to_device, data[-1])
        is_reported = pytest.raises(RuntimeError, match=match)
        if match == "not finite":
            is_reported = pytest.warns(RuntimeWarning, match=match)  # type: ignore[assignment]
        with is_reported:
            step(model, opt, x, y, value)
        after = tensors([[*model.parameters()], opt.state_dict()])
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) or bool(old.isnan().all())
