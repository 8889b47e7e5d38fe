"""Ordinary steps with fixed rates in CUDA graphs: static, without waits, and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import CLASSES, batches, network, optimizer
from torch import Tensor, nn

FIXED = {"adaptive": False, "capturable": True, "fisher": "exact"}
PERIODS = {"factor_update_period": 4, "inverse_update_period": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"nesterov": True, "kl_clip": 1e-2, "max_step_norm": 0.1, "weight_decay": 1e-3},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 1e-2},
    "exact": {"inverse": "exact"},
    "ekfac": {"inverse": "ekfac"},
    "no-momentum": {"momentum": 0.0, "kl_clip": None},
    "excluded": {"exclude": ["0"]},
    "adam": {"exclude": ["0"], "fallback": "adam", "weight_decay": 1e-2},
}
RATES: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.1,
    "tensor": lambda: to_device(torch.tensor(0.1, dtype=torch.float64)),
}

CASES = [*((name, "tensor") for name in OPTIONS), ("clipped", "number"), ("decoupled", "number")]


def late(model: nn.Module, **options: Any) -> Any:
    """Return an optimizer late in training, when most steps are ordinary ones."""
    opt = optimizer(model, **{**FIXED, **PERIODS, **options})
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000
    opt.load_state_dict(state)
    return opt


def step(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    loss: Tensor = opt.loss_fn(model(x), y)
    loss.backward()
    opt.step()
    return loss


@pytest.mark.parametrize(("name", "rate"), CASES)
def test_replayed_steps_are_those_that_are_not_captured(name: str, rate: str) -> None:
    """With updates of factors and inverses in between, and a schedule of the learning rate.

    Ordinary steps that are not captured wait for nothing and are all alike.
    """
    data = batches(10)
    results: list[list[Tensor]] = []
    lists = []
    for is_captured in (False, True):
        with simulated() as record:
            model = to_device(network())
            lr = RATES[rate]()
            opt = late(model, lr=lr, **OPTIONS[name])
            x, y = map(to_device, data[0])
            graph, replayed, losses = None, 0, []
            for index, batch in enumerate(data):
                if index == 6 and isinstance(lr, Tensor):
                    lr.fill_(0.03)
                x.copy_(to_device(batch[0]))
                y.copy_(to_device(batch[1]))
                if is_captured and graph is None and opt.can_replay():
                    before = [held(p.detach()).clone() for p in model.parameters()]
                    steps = opt._preconditioner.steps
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        static = step(model, opt, x, y)
                    assert opt._preconditioner.steps == steps
                    after = [held(p.detach()) for p in model.parameters()]
                    assert all(map(torch.equal, before, after))
                is_ordinary = opt.can_replay()
                record.reset()
                if graph is not None and opt.replay(graph):
                    replayed += 1
                    losses.append(held(static.detach()).clone())
                else:
                    losses.append(held(step(model, opt, x, y).detach()).clone())
                assert not record.mixtures
                assert not (is_ordinary and record.waits)
                if is_ordinary and not is_captured:
                    lists.append([(own.name, own.where, own.kernels) for own in record.launched])
            assert replayed == 7 * is_captured
            results.append([*losses, *(held(p.detach()) for p in model.parameters())])
            results[-1] += [held(b) for b in model.buffers()]
    assert len(lists) == 7
    assert all(own == lists[0] for own in lists)
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)


def plain() -> nn.Module:
    """A network without running statistics, which batches that are not finite would spoil."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).double()


def tensors_of(model: nn.Module, opt: Any) -> list[Tensor]:
    memory = [v for own in opt.state.values() for v in own.values() if isinstance(v, Tensor)]
    return [held(tensor.detach()).clone() for tensor in (*model.parameters(), *memory)]


NOT_FINITE: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "decoupled_weight_decay": True},
    {"fallback": "adam", "exclude": ["1"]},
]


@pytest.mark.parametrize(
    ("value", "is_captured", "options"),
    [
        ((float("nan"), float("inf"))[(index + is_captured) % 2], bool(is_captured), options)
        for index, options in enumerate(NOT_FINITE)
        for is_captured in (0, 1)
    ],
)
def test_the_device_leaves_out_steps_that_are_not_finite(
    value: float, is_captured: bool, options: dict[str, Any]
) -> None:
    """Without a warning, which tests take for an error; the steps that follow are not affected."""
    data = batches(6)
    results = []
    for has_bad in (False, True):
        with simulated() as record:
            model = to_device(plain())
            opt = late(model, lr=0.1, weight_decay=1e-2 * bool(options), **options)
            x, y = map(to_device, data[0])
            step(model, opt, x, y)
            graph = torch.cuda.CUDAGraph()
            if is_captured:
                with torch.cuda.graph(graph):
                    step(model, opt, x, y)
            own = [*data[1:3]]
            if has_bad:
                own.insert(1, (torch.full_like(data[0][0], value), data[0][1]))
            for index, batch in enumerate(own):
                x.copy_(to_device(batch[0]))
                y.copy_(to_device(batch[1]))
                before = tensors_of(model, opt)
                record.reset()
                assert opt.can_replay()
                if not (is_captured and opt.replay(graph)):
                    step(model, opt, x, y)
                assert not record.waits
                after = tensors_of(model, opt)
                is_same = all(map(torch.equal, before, after))
                assert is_same == (has_bad and index == 1)
            results.append(tensors_of(model, opt))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"capturable": False}, "`capturable` must be True"),
        ({}, "must be an ordinary one"),
        ({"steps": 1000}, "without momentum"),
        (
            {"steps": 1000, "rate": torch.tensor(0.1)},
            "on the device of the parameters when capturable=True, got cpu",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(options: dict[str, Any], match: str) -> None:
    given = {"lr": 0.1, **options}
    steps, rate = given.pop("steps", 0), given.pop("rate", 0.1)
    with simulated():
        model, (x, y) = to_device(network()), map(to_device, batches(1)[0])
        opt = late(model, **given) if steps else optimizer(model, **{**FIXED, **given})
        if steps:  # the factors are updated, and the momentum is lost
            step(model, opt, x, y)
            opt.state.clear()
            opt.param_groups[0]["lr"] = rate
        opt.loss_fn(model(x), y).backward()
        before = [held(p.detach()).clone() for p in model.parameters()]
        counted = opt.state_dict()["kfac"]["preconditioner"]["steps"]
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match=match), graph:
            opt.step()
        assert opt.state_dict()["kfac"]["preconditioner"]["steps"] == counted
        assert all(map(torch.equal, before, [held(p.detach()) for p in model.parameters()]))


def test_averages_that_a_capture_would_begin_are_refused() -> None:
    """As with a state of an optimizer that had none."""
    with simulated():
        model, (x, y) = to_device(network()), map(to_device, batches(1)[0])
        known = late(model, lr=0.1, exclude=["0"])
        step(model, known, x, y)
        opt = late(model, lr=0.1, exclude=["0"], fallback="adam")
        opt.load_state_dict(known.state_dict())
        opt.loss_fn(model(x), y).backward()
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match=r"got '0.weight' without .* averages"), graph:
            opt.step()


@pytest.mark.parametrize("inverse", ["factored", "exact", "ekfac"])
def test_inverses_keep_their_memory(inverse: str) -> None:
    """At each step they are those of an optimizer whose steps cannot be captured."""
    with simulated():
        models = [to_device(copy.deepcopy(network())) for _ in range(2)]
        options = {"lr": 0.1, "inverse": inverse}
        options |= {"factor_update_period": 2, "inverse_update_period": 4}
        opts = [late(model, **options, capturable=own) for model, own in zip(models, (True, False))]
        seen: list[list[int]] = []
        for x, y in [(to_device(x), to_device(y)) for x, y in batches(6)]:
            states = []
            for model, opt in zip(models, opts):
                step(model, opt, x, y)
                layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
                states.append([v for own in layers.values() for v in own["inverse"].values()])
            own, other = ([held(v) for v in state if isinstance(v, Tensor)] for state in states)
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)
            seen.append([tensor.data_ptr() for tensor in own])
        assert all(addresses == seen[0] for addresses in seen)
