"""The relative change of the outputs of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac import KFAC
from einconv_kfac.optim.factors import output_change
from einconv_kfac.optim.factors.curvature import RunningCurvature
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
