"""The slow momentum: its recursion, learning rates, and what drops it."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, objective_of, train_step, weights
from sklearn.datasets import load_diabetes
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.momentum.layer_gains import (
    FIRST_GAIN,
    SHRINKAGE_RATE,
    SMALLEST_GAIN,
    SMALLEST_REMAINDER,
)
from einconv_kfac.optim.step.momentum.slow_momentum import (
    BUFFER,
    RESTART_PERIOD,
    WINDOW,
    SlowMomentum,
)

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def test_the_momentum_is_the_sum_it_is_documented_as() -> None:
    """Against the sum over all earlier steps, written out; gains shrink without a gradient."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(12, 3, generator=generator).double()
    signals = torch.rand(12, generator=generator).double() + 0.1
    slow, memory = SlowMomentum(), {"w": dict[str, Any]()}
    point = {"w": torch.zeros(3).double()}
    for t, (u, s) in enumerate(zip(steps, signals.tolist())):
        before, update = point["w"].clone(), {"w": s * u}
        point["w"].add_(update["w"])
        weight = slow.add_(objective_of(point, memory=memory), update, s)
        assert weight == pytest.approx(WINDOW / (t + WINDOW))
        later = torch.zeros(3).double()
        for i in range(t):
            decay = 1.0
            for j in range(i, t):
                decay *= 1 - WINDOW / (j + WINDOW)
            shrunk = FIRST_GAIN * exp(
                -SHRINKAGE_RATE * sum(WINDOW / (j + WINDOW) for j in range(2, i + 1))
            )
            gain = max(SMALLEST_GAIN, shrunk) - float(signals[i])
            later += max(gain, SMALLEST_REMAINDER) * decay * steps[i]
        torch.testing.assert_close(point["w"] - before, s * u + weight * later, **EXACT)
        torch.testing.assert_close(update["w"], point["w"] - before, **EXACT)


def test_a_learning_rate_scales_what_is_followed() -> None:
    memory: dict[str, dict[str, Any]] = {n: {BUFFER: torch.ones(2)} for n in ("half", "none")}
    point = {n: torch.zeros(2) for n in memory}
    slow, rates = SlowMomentum(), {"half": 0.5, "none": 0.0}
    slow.steps = 5
    direction = slow.direction(memory, rates)
    update = {"half": torch.full((2,), 0.25), "none": torch.zeros(2)}
    weight = slow.add_(objective_of(point, rates=rates, memory=memory), update, 1.0)
    torch.testing.assert_close(point["half"], weight * direction["half"])
    assert not point["none"].any()
    assert not direction["none"].any()
    kept = (1 - weight) * (1 + SMALLEST_REMAINDER * 0.25 / 0.5)
    torch.testing.assert_close(memory["half"][BUFFER], torch.full((2,), kept))


def test_a_given_momentum_takes_its_place() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, momentum=0.5)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    momentum = opt.statistics()["momentum"]
    assert 0.45 < momentum <= 0.5  # a bound on the relative change shortens the whole step
    assert all(BUFFER not in opt.state[p] for p in model.parameters())


def test_it_is_dropped_where_it_makes_a_checked_loss_grow() -> None:
    generator = torch.Generator().manual_seed(0)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, safeguard=True)
    for seed in range(8):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    for p in model.parameters():  # random, so that the network does not die but errs
        opt.state[p][BUFFER] = 100 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    x, y = image_batch(seed=8)
    before, point = train_step(model, loss_fn, opt, (x, y)), weights(model)
    assert float(loss_fn(model(x), y).detach()) <= before
    assert all(BUFFER not in opt.state[p] for p in model.parameters())
    moved = torch.cat([opt.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    assert float(moved.norm()) < float(point.norm())


def test_small_noisy_batches_lead_to_the_optimum() -> None:
    """A regression whose least squares solution is known."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 6, generator=generator).double() * torch.logspace(0, -1, 6).double()
    y = x @ torch.ones(6, 1).double() + torch.randn(4096, 1, generator=generator).double()
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(6, 1).double(), nn.MSELoss()
    opt = KFAC(model, loss_fn)
    for step in range(128):
        chosen = slice(step * 16, step * 16 + 16)
        train_step(model, loss_fn, opt, (x[chosen], y[chosen]))
    rows = torch.cat([x, torch.ones_like(y)], 1)
    least = float((y - rows @ torch.linalg.lstsq(rows, y).solution).square().mean())
    excess = float(loss_fn(model(x), y).detach()) - least
    assert excess < 0.05 * least


def test_it_restarts_where_the_objective_of_a_batch_that_repeats_has_grown() -> None:
    slow, memory = SlowMomentum(), {"w": dict[str, Any]()}
    kept = []
    for value in [3.0] * RESTART_PERIOD + [4.0] * RESTART_PERIOD + [3.5] * RESTART_PERIOD:
        slow.add_(objective_of({"w": torch.zeros(2)}, memory=memory), {"w": torch.ones(2)}, 1.0)
        slow.restart_(memory, value, repeats=True)
        kept.append(BUFFER in memory["w"])
    assert [index for index, is_kept in enumerate(kept) if not is_kept] == [RESTART_PERIOD]


def test_it_goes_on_where_batches_differ() -> None:
    slow, memory = SlowMomentum(), {"w": dict[str, Any]()}
    for value in range(3 * RESTART_PERIOD):
        slow.add_(objective_of({"w": torch.zeros(2)}, memory=memory), {"w": torch.ones(2)}, 1.0)
        slow.restart_(memory, float(value), repeats=False)
        assert BUFFER in memory["w"]


def test_raw_features_are_fitted_and_stay_so() -> None:
    """Columns of sizes 1 to 90,000, in single precision."""
    data, target = load_diabetes(return_X_y=True, scaled=False)
    x, y = torch.tensor(data[:354]).float(), torch.tensor(target[:354]).float()[:, None] / 77
    x = torch.cat([x, x * x], 1)
    columns = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(columns, y.double(), driver="gelsd").solution
    optimum = float((columns @ solution - y).square().mean())
    for seed in (2, 4):
        torch.manual_seed(seed)
        model, loss_fn = nn.Linear(20, 1), nn.MSELoss()
        opt = KFAC(model, loss_fn)
        for _ in range(300):
            train_step(model, loss_fn, opt, (x, y))
        assert float(loss_fn(model(x), y).detach()) < 1.05 * optimum
