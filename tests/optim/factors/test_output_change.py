"""The relative change of the outputs of layers."""

from __future__ import annotations

import pytest
import torch
from optim_cases import train_step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac import KFAC
from einconv_kfac.optim.factors import output_change
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.output_change import SMALL_FRACTION
from einconv_kfac.optim.vectors import Direction


def curvature(model: nn.Module) -> tuple[RunningCurvature, Tensor]:
    """Return the running curvature after one batch, and the input factor of a linear layer."""
    loss_fn = nn.CrossEntropyLoss()
    machine = KFAC(model, loss_fn)._preconditioner
    x = torch.randn(40, 9, dtype=torch.float64)
    loss_fn(model(x), torch.arange(40) % 4).backward()
    machine.update_()
    return machine, x.T @ x / len(x)


def directions(model: nn.Module, count: int) -> list[Direction]:
    return [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(count)]


@pytest.mark.parametrize("panel", [1, 2, 4, 100])
def test_large_factors_are_multiplied_by_panels(
    monkeypatch: pytest.MonkeyPatch, panel: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(output_change, "PANEL", panel)
    model = nn.Linear(9, 4, bias=False).double()
    machine, a = curvature(model)
    (update,) = directions(model, 1)
    moved, present = (
        torch.einsum("oi,ij,oj->", w, a, w) for w in (update["weight"], model.weight.detach())
    )
    found = machine.relative_change(update, {"weight": model.weight.detach()})
    torch.testing.assert_close(found, (moved / present).sqrt())


def test_the_part_of_the_parameters_is_computed_once_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(9, 4, bias=False).double()
    machine, a = curvature(model)
    point = {"weight": model.weight.detach()}
    counts, values = [], []
    updates = directions(model, 3)
    for index, update in enumerate(updates):
        if index == 2:  # the step moves the parameters
            point["weight"].mul_(2)
        with FlopCounterMode(display=False) as counter:
            values.append(float(machine.relative_change(update, point)))
        counts.append(counter.get_total_flops())
    once = 2 * 4 * 9 * 9
    assert counts == [2 * once, once, 2 * once]
    for index, update in enumerate(updates):
        w = model.weight.detach() / (1 if index == 2 else 2)
        ratio = (update["weight"] @ a * update["weight"]).sum() / (w @ a * w).sum()
        assert values[index] == pytest.approx(float(ratio.sqrt()))


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3, 1e-8, 0.0])
def test_layers_with_small_outputs_count_in_proportion(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(9, 4, bias=False).double()
    machine, a = curvature(model)
    weight = model.weight.detach() * scale
    (update,) = directions(model, 1)
    moved, present = (torch.einsum("oi,ij,oj->", w, a, w) for w in (update["weight"], weight))
    small = SMALL_FRACTION**2 * 4 * torch.trace(a) / (3 * 9)
    expected = (moved / present).sqrt() if present > small else (moved * present).sqrt() / small
    found = machine.relative_change(update, {"weight": weight})
    torch.testing.assert_close(found, expected)


def test_drawn_weights_of_several_layers_and_groups_count_in_full() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(6, 6, 3, padding=1, groups=2) for _ in range(2)), nn.Flatten(), nn.Linear(96, 4)
    ).double()
    optimizer = KFAC(model, loss_fn := nn.CrossEntropyLoss())
    machine = optimizer._preconditioner
    x = torch.randn(40, 6, 4, 4, dtype=torch.float64)
    loss_fn(model(x), torch.arange(40) % 4).backward()
    machine.update_()
    point = {name: p.detach() for name, p in model.named_parameters()}
    found = machine.relative_change({n: 2 * p for n, p in point.items()}, point)
    assert float(found) == pytest.approx(2 * 3)
    tiny = {n: 1e-9 * p if n.startswith("1.") else p for n, p in point.items()}
    found = machine.relative_change({n: 2 * p for n, p in tiny.items()}, tiny)
    assert float(found) == pytest.approx(2 * 2)


@pytest.mark.parametrize("std", [1e-10, 1e-5])
def test_a_branch_that_starts_near_zero_holds_nothing_up(std: float) -> None:
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
            self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.outer = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            for layer in self.outer:
                nn.init.normal_(layer.weight, 0, std)
                nn.init.zeros_(layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for inner, outer in zip(self.inner, self.outer):
                x = x + outer(inner(x.relu()).relu())
            out: Tensor = self.last(x)
            return out

    model, x = Branches(), torch.randn(256, 8)
    y = (x[:, :4].square().sum(1) > 3).long() + (x[:, 4] > 0)
    optimizer = KFAC(model, loss_fn := nn.CrossEntropyLoss())
    losses = [train_step(model, loss_fn, optimizer, (x, y)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
