"""Steps of models whose weights are computed from parameters, against those of plain models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.vectors import Direction

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": parametrizations.weight_norm,
    "hook": nn.utils.weight_norm,
    "columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "one norm": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]
}
INVERSES = ("factored", "exact", "ekfac")
pytestmark = pytest.mark.filterwarnings("ignore:.*_norm. is deprecated")
BATCH = torch.randn(12, 2, 6, generator=torch.Generator().manual_seed(1)).double()
TARGETS = torch.arange(12) % 3


def networks(
    norm: Callable[[nn.Module], nn.Module], scale: float = 2.5
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a plain network, and one with the same effective weights and norms times a scale."""
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3, groups=2), nn.ConvTranspose1d(4, 2, 2), nn.Linear(10, 3)
    plain = nn.Sequential(
        layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Flatten(), layers[2]
    ).double()
    normed = copy.deepcopy(plain)
    for index in (0, 2, 5):
        norm(normed[index])
    with torch.no_grad():
        for name, parameter in normed.named_parameters():
            if name.endswith(("original1", "weight_v")):
                parameter.mul_(scale)
    normed(BATCH)
    return plain, normed


def weights(model: nn.Sequential) -> dict[str, Tensor]:
    """Return the effective weights and the biases, by name."""
    found = {f"{i}.weight": model[i].weight for i in (0, 2, 5)}
    return {n: t.detach().clone() for n, t in found.items()} | {
        f"{i}.bias": model[i].bias.detach().clone() for i in (0, 2, 5)
    }


def directions(model: nn.Module, inverse: Any) -> tuple[RunningCurvature, Direction, Direction]:
    """Return the curvature after a batch, the gradient, and the preconditioned gradient."""
    loss_fn = nn.CrossEntropyLoss()
    curvature = KFAC(model, loss_fn, inverse=inverse, fisher="exact")._preconditioner
    loss_fn(model(BATCH), TARGETS).backward()
    gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    curvature.update_()
    curvature.refresh_(0.01, {})
    return curvature, gradient, curvature.precondition(gradient)


def changed(curvature: RunningCurvature, update: Direction) -> Direction:
    """Return the changes of the effective weights and the biases by an update, by name."""
    result: Direction = {}
    for running in curvature.layers.values():
        layer = running.layer
        assert layer.computed is not None
        point = {n: p.detach() for n, p in layer.tensors().items()}
        result[layer.layout.weight] = layer.computed.change(point, update)
        assert layer.bias is not None
        result[layer.bias] = update[layer.bias]
    return result


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("norm", NORMS)
def test_directions_change_effective_weights_as_those_of_plain_layers(
    norm: str, inverse: str
) -> None:
    plain, normed = networks(NORMS[norm])
    curvature, own, found = directions(normed, inverse)
    machine, gradient, _ = directions(plain, inverse)
    expected: Direction = {}
    for name, running in curvature.layers.items():
        assert running.stretch < 0.5
        inverses = machine.trial_inverses({})(0.01 / running.stretch)
        step = machine.precondition(gradient, inverses)
        expected |= {own: step[own] for own in machine.layers[name].layer.parameters}
    assert found.keys() == own.keys()
    moved = changed(curvature, found)
    for name, tensor in expected.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-8, atol=1e-10)
    point = {name: p.detach() for name, p in plain.named_parameters()}
    here = {name: p.detach() for name, p in normed.named_parameters()}
    change = machine.relative_change(expected, point)
    torch.testing.assert_close(curvature.relative_change(found, here), change)
    slopes = [
        sum(float((a[n] * b[n]).sum()) for n in b) for a, b in ((gradient, expected), (own, found))
    ]
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-8)


@pytest.mark.parametrize("norm", ["parametrization", "hook", "one norm"])
def test_the_first_step_moves_effective_weights_as_the_step_of_plain_layers(norm: str) -> None:
    plain, normed = networks(NORMS[norm], 1.0)
    moves = []
    for model in (plain, normed):
        loss_fn = nn.CrossEntropyLoss()
        options: Any = {"fisher": "exact", "adaptive": False, "damping": 0.01, "momentum": 0.0}
        opt = KFAC(model, loss_fn, lr=1e-6, **options)
        before = weights(model)
        loss_fn(model(BATCH), TARGETS).backward()
        opt.step()
        model(BATCH)
        moves.append({n: (t - before[n]) / 1e-6 for n, t in weights(model).items()})
    for name, expected in moves[0].items():
        torch.testing.assert_close(moves[1][name], expected, rtol=1e-4, atol=1e-5)


def sizes(model: nn.Module) -> dict[str, Tensor]:
    """Return the norms that the effective weights do not depend on, by name."""
    found = {}
    for name, p in model.named_parameters():
        if name.endswith(("original1", "weight_v")):
            found[name] = p.detach().flatten(1).norm(dim=1)
    return found


def trained(model: nn.Module, steps: int, **options: Any) -> tuple[KFAC, list[float]]:
    """Train on noisy batches."""
    loss_fn = nn.CrossEntropyLoss()
    opt, losses = KFAC(model, loss_fn, **options), []
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        opt.zero_grad()
        noise = torch.randn(BATCH.shape, generator=generator, dtype=torch.float64)
        loss = loss_fn(model(BATCH + 0.5 * noise), TARGETS)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return opt, losses


OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "momentum": {"momentum": 0.9},
    "fixed": {"adaptive": False, "lr": 0.1, "weight_decay": 0.01},
    "decoupled": {
        "adaptive": False,
        "lr": 0.1,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
    "automatic, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("norm", ["parametrization", "hook"])
def test_norms_stay(norm: str, options: str) -> None:
    _, normed = networks(NORMS[norm])
    before = sizes(normed)
    opt, losses = trained(normed, 8, **OPTIONS[options])
    after = sizes(normed)
    assert set(after) == set(before)
    for name, size in before.items():
        torch.testing.assert_close(after[name], size)
    assert min(losses) < losses[0]
    covered = {n for n, kind in opt.coverage().items() if kind == "kfac"}
    assert covered == {n for n, _ in normed.named_parameters()}


def test_undone_steps_are_undone_exactly() -> None:
    _, normed = networks(parametrizations.weight_norm)
    opt, _ = trained(normed, 6)
    before = {n: p.detach().clone() for n, p in normed.named_parameters()}
    last = {n: opt.state[p]["momentum_buffer"] for n, p in normed.named_parameters()}
    opt2, _ = trained(networks(parametrizations.weight_norm)[1], 5)
    earlier = dict(opt2._model.named_parameters())
    for name, value in before.items():
        torch.testing.assert_close(value - last[name], earlier[name].detach())


def test_a_saved_state_continues() -> None:
    first, second = (networks(parametrizations.weight_norm)[1] for _ in range(2))
    opt, _ = trained(first, 4)
    loss_fn = nn.CrossEntropyLoss()
    other = KFAC(second, loss_fn)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(opt.state_dict())
    own = opt._preconditioner.estimator.loss_fn
    assert isinstance(own, nn.CrossEntropyLoss)
    for model, optimizer, given in ((first, opt, own), (second, other, loss_fn)):
        optimizer.zero_grad()
        given(model(BATCH), TARGETS).backward()
        optimizer.step()
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_frozen_scales_keep_the_directions_of_slices() -> None:
    """A scale that is frozen later has no gradient; its part of the weight's gradient is zero."""
    _, normed = networks(parametrizations.weight_norm)
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(normed, loss_fn)
    for frozen in (False, True):
        normed[5].parametrizations.weight.original0.requires_grad_(not frozen)
        opt.zero_grad()
        before = normed[5].parametrizations.weight.original1.detach().clone()
        scale = normed[5].parametrizations.weight.original0.detach().clone()
        loss_fn(normed(BATCH), TARGETS).backward()
        opt.step()
        own = normed[5].parametrizations.weight
        assert torch.equal(own.original0, scale) == frozen
        assert not torch.equal(own.original1, before)


def test_weights_that_are_used_past_their_calls() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = parametrizations.weight_norm(nn.Linear(6, 3, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x.mean(1)) + x.mean(1) @ self.own.weight.T

    torch.manual_seed(0)
    model, loss_fn = Tied().double(), nn.CrossEntropyLoss()
    losses = []
    opt = KFAC(model, loss_fn)
    for _ in range(6):
        opt.zero_grad()
        loss = loss_fn(model(BATCH), TARGETS)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_parametrizations_of_users_are_named() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).mT

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    opt = KFAC(model, nn.CrossEntropyLoss(), exclude=("1",))
    reasons = opt.coverage().reasons
    assert "parametrized" in reasons["0.parametrizations.weight.original"]
    assert "exclude" in reasons["1.weight"]
    normed = parametrizations.weight_norm(nn.Linear(6, 3))
    other = KFAC(nn.Sequential(normed, nn.Linear(3, 3)), nn.CrossEntropyLoss(), exclude=("0",))
    assert "exclude" in other.coverage().reasons["0.parametrizations.weight.original1"]


def test_the_preconditioner_of_other_optimizers_leaves_them_alone() -> None:
    model, loss_fn = networks(parametrizations.weight_norm)[1], nn.CrossEntropyLoss()
    model.append(nn.Linear(3, 3).double())
    preconditioner = KFACPreconditioner(model, loss_fn)
    assert preconditioner.covered() == {"6.weight", "6.bias"}
