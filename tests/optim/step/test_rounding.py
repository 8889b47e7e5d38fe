"""Changes of the loss within its rounding, which leave the damping alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC


class Padded(nn.Module):
    """Appends outputs that no parameter changes, times a scale."""

    def __init__(self, columns: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.columns, self.scale = columns, scale
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.net(x)
        return torch.cat([y, y.new_zeros(len(y), self.columns)], 1)


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    return x, torch.tanh(x @ torch.linspace(-1, 1, 18).reshape(6, 3))


def dampings(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, *, autocast: bool = False, **options: Any
) -> tuple[list[float], list[float]]:
    """Return the dampings and the losses of steps on one batch."""
    loss_fn = nn.MSELoss()
    opt = KFAC(model, loss_fn, **options)
    found, losses = [], []
    for _ in range(steps):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        found.append(opt.statistics()["damping"])
        losses.append(float(loss.detach()))
    return found, losses


@pytest.mark.parametrize(
    ("dtype", "autocast", "options", "steps"),
    [
        (torch.bfloat16, False, {}, 25),
        (torch.bfloat16, False, {"safeguard": True}, 50),
        (torch.bfloat16, False, {"momentum": 0.5}, 120),  # it would grow the slowest
        (torch.float16, False, {}, 25),
        (torch.float32, True, {}, 25),
        (torch.float32, True, {"safeguard": True}, 50),
    ],
)
def test_the_damping_does_not_grow_in_low_precision(
    dtype: torch.dtype, autocast: bool, options: dict[str, Any], steps: int
) -> None:
    x, y = (part.to(dtype) for part in regression())
    found, losses = dampings(Padded().to(dtype), x, y, steps, autocast=autocast, **options)
    assert found[-1] <= 4 * found[0]
    assert losses[-1] < 1e-3 * losses[0]


def test_the_damping_does_not_grow_where_a_constant_hides_the_change() -> None:
    x, y = regression()
    target = torch.cat([y, torch.full((64, 3), 1.4e3)], 1)  # the loss is about 1e6
    model = Padded(3)
    found, _ = dampings(model, x, target, 30)
    assert found[-1] <= found[0]
    with torch.no_grad():
        assert float((model.net(x) - y).square().mean()) < 1e-3


@pytest.mark.parametrize(("options", "steps"), [({}, 40), ({"safeguard": True}, 80)])
def test_the_damping_does_not_grow_where_all_is_fitted(options: dict[str, Any], steps: int) -> None:
    """The loss is that of the rounding of the outputs, far above its own rounding."""
    x, _ = regression()
    model = nn.Linear(6, 3)
    target = x @ torch.linspace(-1, 1, 18).reshape(6, 3) + 1
    found, losses = dampings(model, x, target, steps, **options)
    assert found[-1] <= 2 * found[0]
    assert losses[-1] < 1e-8


@cache
def in_the_unit_one() -> tuple[list[float], list[float]]:
    """What `dampings` returns for the regression in double precision."""
    x, y = regression()
    return dampings(Padded().double(), x.double(), y.double(), 25)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_training_does_not_depend_on_the_unit_of_the_loss(scale: float) -> None:
    x, y = regression()
    model = Padded(scale=scale).double()
    found, losses = dampings(model, x.double(), scale * y.double(), 25)
    expected, ordinary = in_the_unit_one()
    assert [d / scale**2 for d in found] == pytest.approx(expected, rel=1e-3)
    assert [own / scale**2 for own in losses] == pytest.approx(ordinary, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_data_is_learned_after_a_loss_that_cannot_fall(dtype: torch.dtype) -> None:
    """All inputs are equal, their classes are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    x = torch.randn(64, 6, dtype=dtype)
    easy = torch.ones(16, 6, dtype=dtype), torch.arange(16) % 3
    hard = x, (x @ torch.randn(6, 3, dtype=dtype)).argmax(1)
    for step in range(140):
        inputs, classes = easy if step < 100 else hard
        opt.zero_grad()
        loss = loss_fn(model(inputs), classes)
        loss.backward()
        opt.step()
        if step == 40:
            damping = opt.statistics()["damping"]
        if step == 99:
            assert opt.statistics()["damping"] <= 2 * damping
    assert float(loss.detach()) < 0.1


class Recorded:
    """A damping rule that records what it is told."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.value: float | None = None

    def damping(self, step: int) -> float | None:
        return self.value

    def initial(self, curvature: float) -> None:
        self.value = 0.1 * curvature

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None:
        self.ratios.append(ratio)

    def after_rejection(self, factor: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("safeguard", [False, True])
def test_a_rule_is_told_ratios_above_the_rounding(safeguard: bool) -> None:
    x, y = regression()
    rule = Recorded()
    dampings(Padded(), x, y, 12, damping=rule, safeguard=safeguard)
    assert len(rule.ratios) > 1
    constant, rule = torch.cat([y, torch.full((64, 3), 1e5)], 1), Recorded()
    dampings(Padded(3), x, constant, 12, damping=rule, safeguard=safeguard)
    assert not rule.ratios
