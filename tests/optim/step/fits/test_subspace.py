"""The best combination of directions, and the bound on what a step changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.fits.fit import Along, Fit
from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel
from einconv_kfac.optim.step.fits.subspace import CERTAIN_FRACTION, GIVEN_CHANGE, LARGEST_CHANGE
from einconv_kfac.optim.step.momentum import slow_momentum
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts
from einconv_kfac.optim.vectors import combination

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def deep_net(depth: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    widths = [36] + [30] * depth
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(30, 3)).double()


def changes_of(
    model: nn.Sequential, steps: int, **options: Any
) -> tuple[list[float], list[dict[str, float]]]:
    """Train on fresh batches; return the change of every step by the running factors.

    That is the step on a batch, without what is followed of earlier ones.
    """
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    changes, statistics = [], []
    for seed in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        slow = {
            name: m.clone()
            for name, p in model.named_parameters()
            if (m := opt.state[p].get(slow_momentum.BUFFER)) is not None
        }
        train_step(model, loss_fn, opt, image_batch(32, seed=seed))
        statistics.append(opt.statistics())
        weight = statistics[-1].get("momentum", 0.0)
        own = {
            name: p.detach() - before[name] - weight * slow.get(name, torch.zeros(()))
            for name, p in model.named_parameters()
        }
        if "rejected" not in statistics[-1]:
            total = 0.0
            for name, running in opt._preconditioner.layers.items():
                a = running.factors[0][0]  # [d, d], one group
                w, b = (before[f"{name}.{part}"] for part in ("weight", "bias"))
                rows = torch.cat([w, b[:, None]], 1)
                u = torch.cat([own[f"{name}.weight"], own[f"{name}.bias"][:, None]], 1)
                total += math.sqrt(torch.trace(u @ a @ u.T) / torch.trace(rows @ a @ rows.T))
            changes.append(total)
    return changes, statistics


def test_no_step_changes_the_layers_by_more_than_the_bound() -> None:
    """Neither a step for which all coefficients are fitted nor one that is rescaled."""
    changes, _ = changes_of(deep_net(), 80)
    assert max(changes) == pytest.approx(LARGEST_CHANGE, rel=1e-9)
    assert max(changes[50:]) > CERTAIN_FRACTION * LARGEST_CHANGE  # mostly rescaled


@pytest.mark.parametrize("damping", [1e-3, 1e-8])
def test_nor_does_one_with_a_given_damping(damping: float) -> None:
    changes, _ = changes_of(deep_net(), 20, damping=damping)
    assert max(changes) == pytest.approx(GIVEN_CHANGE, rel=1e-9)


class Shifted(nn.Module):
    """A shift without factors, beside a layer that can make up for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x.flatten(1)) + self.shift))
        return result


@pytest.mark.parametrize("differ", [True, False])
def test_no_parameter_without_factors_goes_uphill_where_batches_differ(differ: bool) -> None:
    model, loss_fn = Shifted().double(), nn.CrossEntropyLoss()
    opt, uphill = KFAC(model, loss_fn), 0
    for seed in range(24):
        before = model.shift.detach().clone()
        slow = opt.state[model.shift].get(slow_momentum.BUFFER, torch.zeros(8)).clone()
        train_step(model, loss_fn, opt, image_batch(32, seed=seed if differ else 0))
        own = model.shift.detach() - before - opt.statistics()["momentum"] * slow
        assert model.shift.grad is not None
        uphill += float(own @ model.shift.grad) > 1e-12
    assert (uphill == 0) == differ


def test_the_change_is_that_of_the_outputs() -> None:
    """The running factors of one batch measure the outputs of the layers on it."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    machine = KFAC(model, loss_fn)._preconditioner
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    machine.update_()
    generator = torch.Generator().manual_seed(1)
    point = {name: p.detach() for name, p in model.named_parameters()}
    update = {n: torch.randn(p.shape, generator=generator).double() for n, p in point.items()}
    expected = 0.0
    for index, inputs in ((0, x), (2, model[:2](x).detach()), (5, model[:5](x).detach())):
        layer: Callable[..., Tensor] = model[index]
        outputs = []
        for values in (update, point):
            own = {part: values[f"{index}.{part}"] for part in ("weight", "bias")}
            outputs.append(torch.func.functional_call(layer, own, (inputs,)))
        moved, present = (float(output.detach().square().sum()) for output in outputs)
        expected += math.sqrt(moved / present)
    assert float(machine.relative_change(update, point)) == pytest.approx(expected, rel=1e-9)


def test_what_was_not_updated_does_not_change() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    machine = KFAC(model, loss_fn)._preconditioner
    assert machine.relative_change({}, {}) == 0.0  # no factors yet
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    machine.update_()
    point = {name: p.detach() for name, p in model.named_parameters()}
    assert machine.relative_change({n: torch.zeros_like(p) for n, p in point.items()}, point) == 0
    alone = machine.relative_change({"5.weight": point["5.weight"]}, point)
    with_bias = {"5.weight": point["5.weight"], "5.bias": point["5.bias"]}
    assert alone > 0
    assert float(machine.relative_change(with_bias, point)) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_starts_at_zero_is_trained(dtype: torch.dtype) -> None:
    model, loss_fn = conv_net().to(dtype), nn.CrossEntropyLoss()
    nn.init.zeros_(model[5].weight)
    nn.init.zeros_(model[5].bias)
    opt = KFAC(model, loss_fn)
    x, y = image_batch(24)
    losses = [train_step(model, loss_fn, opt, (x.to(dtype), y)) for _ in range(10)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_scaled_step_is_that_multiple() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(3, generator=generator).double()} for _ in range(2))
    gram = torch.stack([a["w"], b["w"]]) @ torch.stack([a["w"], b["w"]]).T
    model = QuadraticModel(torch.tensor([-1.0, 0.5]).double(), 2 * gram, gram)
    coefficients = torch.tensor([0.5, 0.25]).double()
    trusted = replace(model, slope=model.slope * 0.5)
    along = Along(*Along.of(model, trusted, coefficients, 0.1).tolist())
    fit = Fit([a, b], (0.5, 0.25), along, (0.5, 0.25))
    step = 0.5 * a["w"] + 0.25 * b["w"]
    slope, curved = -0.5 + 0.125, 2.1 * float(step.square().sum())
    assert fit.length == pytest.approx(float(step.norm()))
    assert fit.expected == pytest.approx(slope / 2 + curved / 2)
    assert fit.predicted() == pytest.approx(slope + curved / 2)
    assert fit.predicted(0.5) == pytest.approx(slope / 2 + curved / 8)
    assert fit.moved() == pytest.approx(2 * float(a["w"] @ step))
    assert fit.moved(3.0) == pytest.approx(2 * float(a["w"] @ (step + 3 * b["w"])))
    half = fit.scaled(0.5)
    assert (half.mix, half.coefficients) == ((0.25, 0.125), (0.25, 0.125))
    assert half.expected == pytest.approx(slope / 4 + curved / 8)
    assert half.moved() == pytest.approx(float(a["w"] @ step))
    assert half.length == pytest.approx(fit.length / 2)
    torch.testing.assert_close(combination(["w"], half.mix, [a, b])["w"], step / 2, **EXACT)


def test_a_slow_momentum_changes_slopes_as_its_own_slope_says() -> None:
    """Exactly so for a direction by the inverse curvature, here the dense one."""
    generator = torch.Generator().manual_seed(0)
    root, g, m = (torch.randn(n, 3, generator=generator).double() for n in (4, 1, 1))
    curvature = root.T @ root
    d = -torch.linalg.solve(curvature, g[0])
    u = 0.3 * d
    along = Along(float(g[0] @ u), 0.0, 0.0, 0.0, first_bend=float(d @ curvature @ u))
    products = {
        "a": LayerProducts(past=float(g[0, :2] @ m[0, :2])),
        "b": LayerProducts(past=float(g[0, 2:] @ m[0, 2:])),
    }
    fit = Fit([{"w": d}], (0.3,), along, (0.3,), products=products).with_slow_momentum()
    assert fit.mix == (0.3, 0.0)
    assert fit.moved(2.0) == pytest.approx(float(d @ curvature @ (u + 2 * m[0])))
    half = fit.scaled(0.5)
    assert half.moved(2.0) == pytest.approx(float(d @ curvature @ (u / 2 + 2 * m[0])))


def test_combinations_leave_out_what_a_direction_does_not_have() -> None:
    a, b = {"v": torch.ones(2)}, {"v": torch.full((2,), 3.0), "w": torch.ones(1)}
    found = combination(("v", "w"), (2.0, 0.5), [a, b])
    assert found["v"].tolist() == [3.5, 3.5]
    assert found["w"].tolist() == [0.5]
    assert a["v"].tolist() == [1.0, 1.0]
