"""The first step, whose checks the host reads with its other numbers: as on the processor."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
MOST_WAITS = 2


def step(model: nn.Module, opt: Any, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
    opt.zero_grad()
    (factor * opt.loss_fn(model(x), y)).backward()
    opt.step()


class Drifting(nn.Module):
    """A model whose outputs depend on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x)
        return y * self.calls


class Detached(nn.Module):
    """A model that takes the gradient of its energy by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.inner(x).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.flatten(1)[:, :10]


class Unused(nn.Module):
    """A model with a call between two others of its layer whose output it drops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(192, 8).double(), nn.Linear(8, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.first(x.flatten(1)).tanh())
        self.inner(x)
        y: Tensor = self.inner(x.tanh())
        return y


class TimeFirst(nn.Module):
    """A model that has as many positions as a batch of 16 has examples, and has them first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(12, 8).double(), nn.Linear(8, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), 16, 12).transpose(0, 1)
        y: Tensor = self.last(self.inner(rows).tanh().mean(0))
        return y


LAYOUTS = {
    "build": [network, TimeFirst],
    "inverse": ["factored", "exact"],
    "options": [{}, {"adaptive": False, "lr": 0.1}],
    "approximation": ["expand", "reduce"],
    "sizes": [(16,), (8, 16)],
}
QUARTER = [(*own, own[0] ^ own[1], own[0] ^ own[2]) for own in product((0, 1), repeat=3)]
"""Which value each argument has: every combination of any two of them twice."""


@pytest.mark.parametrize(
    tuple(LAYOUTS),
    [[own[i] for own, i in zip(LAYOUTS.values(), chosen, strict=True)] for chosen in QUARTER],
)
def test_layouts_without_gradients_are_no_wait_of_their_own(
    build: Any, inverse: str, options: dict[str, Any], approximation: str, sizes: tuple[int, ...]
) -> None:
    """Also where they are not the usual ones, in the first batch of a step or in a later one."""
    given = {"fisher": "forward-only", "approximation": approximation, "inverse": inverse}
    torch.manual_seed(0)
    here = build()
    there = copy.deepcopy(here)
    pairs = [
        [(x[:size], y[:size]) for size, (x, y) in zip(sizes, data)]
        for data in (batches(2), batches(4)[2:])
    ]
    own = optimizer(here, **given, **options)
    for pair in pairs:
        own.zero_grad()
        for x, y in pair:
            own.loss_fn(here(x), y).backward()
        own.step()
    with simulated() as record:
        there = to_device(there)
        other = optimizer(there, **given, **options)
        for pair in pairs:
            parts = [(to_device(x), to_device(y)) for x, y in pair]
            other.zero_grad()
            record.reset()
            for x, y in parts:
                other.loss_fn(there(x), y).backward()
            other.step()
            assert not record.mixtures
            assert record.waited <= 1 + (inverse == "exact"), record.waits
        for p, q in zip(here.parameters(), there.parameters()):
            torch.testing.assert_close(held(q.detach()), p.detach(), **TOLERANCE)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (network, {}),
        (network, {"safeguard": True}),
        (network, {"weight_decay": 1e-2}),
        (Detached, {}),
        (Unused, {"safeguard": True}),
    ],
)
def test_it_is_that_of_the_processor(build: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    here = build()
    there = copy.deepcopy(here)
    own = optimizer(here, fisher="exact", **options)
    data = batches(2)
    for x, y in data:
        step(here, own, x, y)
    with simulated() as record:
        there = to_device(there)
        other = optimizer(there, fisher="exact", **options)
        for batch in data:
            x, y = map(to_device, batch)
            record.reset()
            step(there, other, x, y)
            assert not record.mixtures
            if build is not Detached:
                assert record.waited <= MOST_WAITS, record.waits
        for p, q in zip(here.parameters(), there.parameters()):
            torch.testing.assert_close(held(q.detach()), p.detach(), **TOLERANCE)
        assert other.statistics()["damping"] == pytest.approx(own.statistics()["damping"])


def test_a_model_that_does_not_repeat_its_output_is_refused() -> None:
    """Again and again, before anything is changed."""
    with simulated():
        torch.manual_seed(0)
        model, (x, y) = to_device(Drifting()), map(to_device, batches(1)[0])
        opt = optimizer(model)
        before = [held(p.detach()).clone() for p in model.parameters()]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="must repeat its output"):
                step(model, opt, x, y)
        assert opt.state_dict()["kfac"]["preconditioner"]["steps"] == 0
        assert all(map(torch.equal, before, [held(p.detach()) for p in model.parameters()]))


@pytest.mark.parametrize("factor", [float("nan"), 0.0, -1.0])
def test_what_comes_after_a_first_step_that_is_not_taken(factor: float) -> None:
    """A loss that is not finite, no gradient, or a negative weight: then the next is the first."""
    results = []
    for is_there in (False, True):
        with simulated() if is_there else torch.enable_grad():
            model, data = network(), batches(2)
            if is_there:
                model = to_device(model)
                data = [(to_device(x), to_device(y)) for x, y in data]
            opt = optimizer(model, fisher="exact")
            if factor == 0:
                step(model, opt, *data[0], factor)
            elif factor < 0:
                with pytest.raises(RuntimeError, match="negative"):
                    step(model, opt, *data[0], factor)
            else:
                with pytest.warns(RuntimeWarning, match="not finite"):
                    step(model, opt, *data[0], factor)
            for x, y in data[1:]:
                step(model, opt, x, y)
            results.append([held(p.detach()) for p in model.parameters()])
    for own, other in zip(*results):
        torch.testing.assert_close(other, own, **TOLERANCE)


def test_inputs_that_are_not_finite_do_not_decide_on_layouts() -> None:
    """Of the first batch, of which the layouts of the examples are found out."""
    results = []
    for is_there in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 10)).double()
        with simulated() if is_there else torch.enable_grad():
            data = batches(3)
            data[0] = torch.full_like(data[0][0], float("nan")), data[0][1]
            if is_there:
                model = to_device(model)
                data = [(to_device(x), to_device(y)) for x, y in data]
            opt = optimizer(model, fisher="exact")
            with pytest.warns(RuntimeWarning, match="not finite"):
                step(model, opt, *data[0])
            for x, y in data[1:]:
                step(model, opt, x, y)
            results.append([held(p.detach()) for p in model.parameters()])
    for own, other in zip(*results):
        torch.testing.assert_close(other, own, **TOLERANCE)
