"""The quadratic model against the dense GGN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, objective_of
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel, quadratic_model

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def recorded(
    model: nn.Module, loss_fn: nn.Module, batches: list[Any]
) -> tuple[Replay, list[Batch]]:
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    for x, y in batches:
        (loss_fn(model(x), y) / len(batches)).backward()
    return Replay(model, recorder.paused), recorder.take()


def dense_ggn(model: nn.Module, loss_fn: nn.Module, batch: Any) -> Tensor:
    """Return ``J^T H J`` with the whole Jacobian and the whole loss Hessian."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    state = torch.get_rng_state()

    def output(values: dict[str, Tensor]) -> Tensor:
        torch.set_rng_state(state)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, {**buffers, **values}, (batch[0],))

    f = output(parameters)
    jacobian = torch.cat([j.reshape(f.numel(), -1) for j in jacrev(output)(parameters).values()], 1)
    hessian = torch.autograd.functional.hessian(lambda out: loss_fn(out, batch[1]), f)
    hessian = hessian.reshape(f.numel(), f.numel())
    return jacobian.T @ hessian @ jacobian


def directions(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        for _ in range(count)
    ]


def flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in direction.values()])


@pytest.mark.parametrize("random_layers", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvature_is_that_of_the_dense_ggn(random_layers: bool, reduction: str) -> None:
    model, loss_fn = conv_net(random_layers=random_layers), nn.CrossEntropyLoss(reduction=reduction)
    batch = image_batch(5)
    torch.manual_seed(7)
    ggn = dense_ggn(model, loss_fn, batch)
    torch.manual_seed(7)
    replay, seen = recorded(model, loss_fn, [batch])
    buffers = [b.clone() for b in model.buffers()]
    chosen = directions(model, 3)
    gradient = {n: p.grad for n, p in model.named_parameters()}
    point = objective_of(dict(model.named_parameters()), gradient=gradient, batches=seen)
    found = quadratic_model(replay, point, chosen)
    columns = torch.stack([flat(d) for d in chosen])
    torch.testing.assert_close(found.curvature, columns @ ggn @ columns.T, **EXACT)
    torch.testing.assert_close(found.gram, columns @ columns.T, **EXACT)
    torch.testing.assert_close(found.slope, columns @ flat(gradient), **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))


def test_curvature_is_the_weighted_sum_of_the_batches() -> None:
    model, loss_fn = conv_net(), nn.MSELoss()
    batches = [(image_batch(n, n)[0], torch.randn(n, 3).double()) for n in (2, 4)]
    ggn = sum(dense_ggn(model, loss_fn, batch) / 2 for batch in batches)
    replay, seen = recorded(model, loss_fn, batches)
    chosen = directions(model, 2)
    gradient = {n: p.grad for n, p in model.named_parameters()}
    decay = dict.fromkeys(gradient, 0.5)
    parameters = dict(model.named_parameters())
    point = objective_of(parameters, gradient=gradient, decay=decay, batches=seen)
    found = quadratic_model(replay, point, chosen)
    columns = torch.stack([flat(d) for d in chosen])
    expected = columns @ (ggn + 0.5 * torch.eye(len(ggn)).double()) @ columns.T
    torch.testing.assert_close(found.curvature, expected, **EXACT)


def test_minimum_has_no_slope_left_and_keeps_what_is_fixed() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator).double()
    model = QuadraticModel(
        torch.randn(3, generator=generator).double(), root @ root.T, root.T @ root
    )
    damped = model.curvature + 0.1 * model.gram
    free = model.minimum(0.1)
    torch.testing.assert_close(damped @ free, -model.slope, **EXACT)
    fixed = model.minimum(0.1, {1: 0.7})
    assert fixed[1] == 0.7
    torch.testing.assert_close((damped @ fixed + model.slope)[[0, 2]], torch.zeros(2).double())
    assert model.change(free, 0.1) < model.change(fixed, 0.1)


def test_downhill_is_the_minimum_or_that_along_the_separate_minima() -> None:
    generator, uphill = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        root = torch.randn(2, 2, generator=generator).double()
        slope = torch.randn(2, generator=generator).double()
        model = QuadraticModel(slope, root @ root.T, torch.eye(2).double())
        found, damped = model.downhill(0.1), model.curvature + 0.1 * model.gram
        whole = -torch.linalg.solve(damped, slope)
        if bool((slope * whole < 0).all()):
            torch.testing.assert_close(found, whole, **EXACT)
            continue
        uphill += 1
        assert bool((slope * found < 0).all())
        separate = -slope / damped.diagonal()
        torch.testing.assert_close(found[0] * separate[1], found[1] * separate[0], **EXACT)
        left = found @ (damped @ found + slope)  # no slope along the step is left
        torch.testing.assert_close(left, torch.zeros(()).double(), **EXACT)
    assert 5 < uphill < 45


def test_downhill_keeps_what_is_fixed() -> None:
    slope = torch.tensor([-1.0, -0.1, -1.0], dtype=torch.float64)
    coupled = torch.eye(3, dtype=torch.float64)
    coupled[0, 1] = coupled[1, 0] = 0.9
    model = QuadraticModel(slope, coupled, torch.zeros(3, 3).double())
    assert model.minimum(0.0)[1] < 0
    found = model.downhill(0.0, {2: -0.5})
    expected = torch.tensor([1.01 / 1.19, 0.101 / 1.19, -0.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **EXACT)


def test_minimum_ignores_a_direction_whose_square_underflows() -> None:
    matrix = torch.tensor([[1.0, 1e-30], [1e-30, 0.0]]).double()
    model = QuadraticModel(
        torch.tensor([-1.0, -1e-30]).double(), matrix, torch.zeros(2, 2).double()
    )
    assert model.minimum(0.0).tolist() == [1.0, 0.0]
    assert model.minimum(0.0, {0: 0.5}).tolist() == [0.5, 0.0]


def test_minimum_ignores_a_direction_that_repeats_another() -> None:
    ones = torch.ones(2, 2).double()
    model = QuadraticModel(torch.tensor([-1.0, -1.0]).double(), ones, ones)
    torch.testing.assert_close(model.minimum(0.0).sum(), torch.ones(()).double(), **EXACT)
