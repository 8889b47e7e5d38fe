"""Trust in the slope of a batch, from other batches."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from optim_cases import Batch, assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel
from einconv_kfac.optim.step.fits.slope_trust import (
    SAMPLE_BOUNDS,
    SMALLEST_TRUST,
    TRUST_DECAY,
    SlopeTrust,
)

ROUNDING = 1e-7


def regression(seed: int, *, noise: float = 0.5, truth: float = 1.0, size: int = 300) -> Batch:
    """Return inputs, and outputs that depend on them linearly but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    y = truth * x[:, :2] + noise * torch.randn(size, 2, generator=generator, dtype=torch.float64)
    return x, y


def linear() -> nn.Linear:
    model = nn.Linear(4, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"lr": 0.3}, {"damping": 0.5}])
def test_one_batch_of_a_quadratic_problem_confirms_itself(options: dict[str, Any]) -> None:
    """The slope after a step is known exactly: ``(g + G u).d - d.G u = g.d``."""
    torch.manual_seed(0)
    model, loss_fn, batch = nn.Linear(4, 2).double(), nn.MSELoss(), regression(0)
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for _ in range(5):
        train_step(model, loss_fn, opt, batch)
        trust = opt._step._trust
        assert trust.fraction == pytest.approx(1.0, abs=ROUNDING)
    assert trust.average == pytest.approx(1.0, abs=ROUNDING)


def samples(count: int, **problem: float) -> Tensor:
    """Return what a second batch says of the slope of a first one, for many pairs."""
    found = []
    for seed in range(count):
        model, loss_fn = linear(), nn.MSELoss()
        opt = KFAC(model, loss_fn, fisher="exact")
        for batch in (regression(2 * seed, **problem), regression(2 * seed + 1, **problem)):
            train_step(model, loss_fn, opt, batch)
        trust = opt._step._trust
        found.append(trust.average)
    return torch.tensor(found)


def test_other_batches_do_not_confirm_pure_noise() -> None:
    assert abs(float(samples(40, truth=0.0).mean())) < 0.15
    assert float(samples(10, noise=0.1).mean()) > 0.9


def test_the_sample_is_its_definition() -> None:
    """From gradients and the dense Hessian of two batches; the first step is one of descent."""
    model, loss_fn = linear(), nn.MSELoss()
    first, second = regression(0, size=20), regression(1, size=20)
    opt = KFAC(model, loss_fn, fisher="exact")
    points, gradients = [weights(model)], []
    train_step(model, loss_fn, opt, first)
    direction = {n: d.clone() for n, d in opt._step._trust._direction.items()}
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    points.append(weights(model))
    train_step(model, loss_fn, opt, second)
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    def loss(point: Tensor) -> Tensor:
        return loss_fn(first[0] @ point[:8].reshape(2, 4).T + point[8:], first[1])

    hessian = torch.autograd.functional.hessian(loss, points[0])
    d = torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])
    expected = (gradients[1] @ d - d @ hessian @ (points[1] - points[0])) / (gradients[0] @ d)
    trust = opt._step._trust
    assert SAMPLE_BOUNDS[0] < float(expected) < SAMPLE_BOUNDS[1]
    assert trust.average == pytest.approx(float(expected), rel=1e-9)


def sampled(*held: float) -> SlopeTrust:
    """Return the trust after samples."""
    trust = SlopeTrust()
    for value in held:
        trust.predict_({"w": torch.tensor([-1.0, 0.0])}, -1.0, 0.25)
        trust.sample_({"w": torch.tensor([value - 0.25, 7.0])})
    return trust


def test_samples_are_clipped_and_averaged_without_bias() -> None:
    assert SlopeTrust().fraction == 1.0
    assert sampled(10.0).average == pytest.approx(SAMPLE_BOUNDS[1])
    assert sampled(10.0).fraction == 1.0
    assert sampled(-10.0).average == pytest.approx(SAMPLE_BOUNDS[0])
    assert sampled(-10.0).fraction == SMALLEST_TRUST
    values = [0.9, 0.8, 1.4, -5.0, 0.7]
    kept = [max(value, SAMPLE_BOUNDS[0]) for value in values]
    parts = [(1 - TRUST_DECAY) * TRUST_DECAY ** (4 - i) * value for i, value in enumerate(kept)]
    assert sampled(*values).fraction == pytest.approx(sum(parts) / (1 - TRUST_DECAY**5))


def test_nothing_is_learned_from_what_was_not_noted_or_no_descent() -> None:
    trust = sampled(0.5)
    trust.sample_({"w": torch.tensor([-9.0, 0.0])})  # nothing noted since
    assert trust.fraction == pytest.approx(0.5)
    trust.predict_({"w": torch.ones(2)}, 0.0, 0.0)
    trust.sample_({"w": torch.ones(2)})
    assert trust.fraction == pytest.approx(0.5)
    trust.predict_({"w": torch.ones(2)}, -1.0, 0.0)
    trust.drop_()
    trust.sample_({"w": torch.ones(2)})
    assert trust.fraction == pytest.approx(0.5)


def test_a_gradient_of_other_parameters_is_no_sample() -> None:
    trust = sampled(0.5)
    trust.predict_({"w": torch.ones(2)}, -1.0, 0.0)
    trust.sample_({"v": torch.ones(2)})
    assert trust.fraction == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"safeguard": True}, {"damping": 0.1, "momentum": 0.5}])
def test_parts_of_a_model_are_trained_in_turns(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]).double()
    opt, batch, losses = KFAC(parts, fisher="exact", **options), regression(0), []
    for number in range(16):
        for index, part in enumerate(parts):
            part.requires_grad_(index == number % 2)
        opt.zero_grad()
        loss = opt.observe(nn.functional.mse_loss(parts[number % 2](batch[0]), batch[1]))
        loss.backward()
        before = weights(parts[1 - number % 2])
        opt.step()
        assert torch.equal(before, weights(parts[1 - number % 2]))
        losses.append(float(loss.detach()))
    x = torch.cat([batch[0], torch.ones(len(batch[0]), 1, dtype=torch.float64)], dim=1)
    smallest = (x @ torch.linalg.lstsq(x, batch[1]).solution - batch[1]).square().mean()
    assert max(losses[-2:]) - smallest < 0.01 * (min(losses[:2]) - smallest)


def test_an_error_in_a_step_of_other_parameters_is_shown_and_changes_nothing() -> None:
    parts = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]).double()
    opt, batch = KFAC(parts, fisher="exact"), regression(0)

    def backward(number: int) -> None:
        opt.zero_grad()
        opt.observe(nn.functional.mse_loss(parts[number](batch[0]), batch[1])).backward()

    for _ in range(3):
        backward(0)
        opt.step()
    before, state = weights(parts), deepcopy(opt.state_dict())
    backward(1)
    fails = mock.patch.object(SlopeTrust, "pending_sample", side_effect=MemoryError("no"))
    with fails, pytest.raises(MemoryError, match="no"):
        opt.step()
    assert torch.equal(before, weights(parts))
    assert_same(state, opt.state_dict())


def test_only_slopes_of_descent_are_corrected() -> None:
    model = QuadraticModel(
        torch.tensor([-4.0, -2.0, 3.0]).double(), torch.eye(3).double(), torch.eye(3).double()
    )
    found = sampled(0.25).corrected(model, 2)
    torch.testing.assert_close(found.slope, torch.tensor([-1.0, -0.5, 3.0]).double())
    assert found.curvature is model.curvature
    assert model.slope.tolist() == [-4.0, -2.0, 3.0]


def test_a_state_goes_on_where_it_was() -> None:
    trust = sampled(0.5, 0.1)
    trust.predict_({"w": torch.tensor([-1.0, 0.5])}, -1.0, 0.25)
    buffer = io.BytesIO()
    torch.save(trust.state_dict(), buffer)
    buffer.seek(0)
    again, state = SlopeTrust(), torch.load(buffer, weights_only=True)
    again.load_state_dict(state, {"w": torch.zeros(2)})
    state["direction"]["w"].zero_()  # it is a copy
    for each in (trust, again):
        each.sample_({"w": torch.tensor([0.1, 0.2])})
    assert again.fraction == trust.fraction != sampled(0.5, 0.1).fraction


def test_a_step_that_is_undone_is_forgotten() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for _ in range(2):
        train_step(model, loss_fn, opt, image_batch())
    trust = opt._step._trust
    before = trust.fraction
    assert trust._direction
    x, y = image_batch()
    (100 * loss_fn(model(x), y)).backward()
    opt.step()
    assert opt.statistics()["rejected"] == 1
    assert not trust._direction
    assert trust.fraction == before
    train_step(model, loss_fn, opt, image_batch())
    assert trust.fraction == before


def test_the_state_of_an_optimizer_has_it() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    state = opt.state_dict()["kfac"]["automatic"]["trust"]
    assert state["weight"] > 0
    assert state["direction"].keys() == dict(model.named_parameters()).keys()
    again = KFAC(model, loss_fn)
    again.load_state_dict(opt.state_dict())
    assert again._step._trust.fraction == opt._step._trust.fraction
    assert opt.statistics()["trust"] == opt._step._trust.fraction
