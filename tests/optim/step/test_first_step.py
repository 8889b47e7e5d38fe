"""First steps at a zero gradient, and from saturated outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

Start = tuple[nn.Module, nn.Module, Tensor, Tensor]
FIXED = {"adaptive": False, "lr": 0.1}


def ignored() -> Start:
    loss_fn = nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    return nn.Linear(5, 3), loss_fn, torch.randn(4, 5), torch.full((4,), -100)


def fitted() -> Start:
    model, x = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)), torch.randn(4, 5)
    return model, nn.MSELoss(), x, model(x).detach()


def half_fitted() -> Start:
    model, x = nn.Linear(5, 3).half(), torch.randn(4, 5).half()
    return model, nn.MSELoss(), x, model(x).detach()


def no_inputs() -> Start:
    return nn.Linear(5, 3, bias=False), nn.MSELoss(), torch.zeros(4, 5), torch.randn(4, 3)


STARTS = [ignored, fitted, half_fitted, no_inputs]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"damping": 0.1},
    {"momentum": 0.5},
    {"inverse": "exact", "safeguard": True},
    {"inverse": "ekfac", "factor_fraction": 0.5},
    {"fallback": "gradient", "curvature_fraction": 0.5},
    {"fisher": "empirical", "inverse_in_background": True},
    {**FIXED},
    {**FIXED, "inverse": "ekfac"},
    {**FIXED, "inverse": "exact", "fallback": "adam", "fisher": "exact"},
]
IN_TURN = [
    (options, start)
    for i, options in enumerate(OPTIONS)
    for j, start in enumerate(STARTS)
    if not options or options == FIXED or (i + j) % 2 == 0
]
"""Defaults with all starts, other options with two of them in turn."""


@pytest.mark.parametrize(("options", "start"), IN_TURN)
def test_a_zero_gradient_moves_nothing(options: dict[str, Any], start: Callable[[], Start]) -> None:
    """And the next batches are trained on as usual."""
    torch.manual_seed(0)
    model, loss_fn, x, y = start()
    opt, before = KFAC(model, loss_fn, **options), weights(model)
    for _ in range(2):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
        assert torch.equal(weights(model), before)
    x = torch.randn(4, 5).to(x)
    y = torch.randint(3, (4,)) if start is ignored else torch.randn(4, 3).to(y)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]
    assert bool(weights(model).isfinite().all())


def tabular(seed: int, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Return raw columns, such as an income, an age and a year, with classes."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 6, generator=generator)
    scale, shift = torch.tensor([3e4, 12, 5, 1, 1, 1]), torch.tensor([5e4, 40, 2010, 0, 0, 0])
    return z * scale + shift, (z @ torch.randn(6, 3, generator=generator)).argmax(1)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


@pytest.mark.parametrize(
    ("seed", "options"),
    [*((seed, {}) for seed in range(3)), (0, {"inverse": "exact"}), (1, {"momentum": 0.5})],
)
def test_saturated_outputs_are_left(seed: int, options: dict[str, Any]) -> None:
    x, y = tabular(seed)
    model, loss_fn = network(seed), nn.CrossEntropyLoss()
    opt, losses = KFAC(model, loss_fn, **options), []
    for step in range(15):
        rows = torch.randperm(512, generator=torch.Generator().manual_seed(step))[:128]
        opt.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.parametrize("offset", [0.0, -1e9])
def test_the_first_damping_promises_no_more_than_the_loss(offset: float) -> None:
    """The softmax is certain, and wrong: its Hessian is zero in float64 as well.

    For a negative objective, which has no such bound, it promises no more than its size.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = 1e5 * torch.randn(8, 3).double()
    with torch.no_grad():
        y = model(x).argmin(1)
    opt = KFAC(model)
    loss = opt.observe(nn.functional.cross_entropy(model(x), y) + offset)
    loss.backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    opt.step()
    expected = 0.1 * square / (2 * abs(float(loss.detach())))
    assert opt.statistics()["damping"] == pytest.approx(expected)


def test_an_ordinary_first_damping_is_a_tenth_of_the_curvature() -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    opt = KFAC(model, loss_fn)
    loss_fn(model(x), y).backward()
    w, b = (p.grad.clone() for p in model.parameters())
    along = x @ w.T + b
    curvature = 2 * along.square().mean() / (w.square().sum() + b.square().sum())
    opt.step()
    assert opt.statistics()["damping"] == pytest.approx(0.1 * float(curvature))


@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_given_damping_that_is_too_small_does_not_explode(seed: int, damping: float) -> None:
    """The whole of raw columns, on every step, from saturated outputs."""
    x, y = tabular(seed)
    torch.manual_seed(seed)
    model, loss_fn = nn.Linear(6, 3).double(), nn.CrossEntropyLoss()
    opt, losses, x = KFAC(model, loss_fn, damping=damping), [], x.double()
    for _ in range(40):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 3 * losses[0]
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]  # single losses are left to rounding
