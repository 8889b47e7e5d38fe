"""Steps between two fits, which take the coefficients of the last one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from optim_cases import image_batch, late_training, train_step
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.agreement import LARGEST_NOISE
from einconv_kfac.optim.step.fits.subspace import FIT_PERIOD
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER
from einconv_kfac.optim.step.step_fit import LONGEST_WAIT

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of directions of which Jacobian-vector products were computed."""
    found, compute = [], Replay.jacobian_products

    def counted(self: Replay, batch: Any, parameters: Any, directions: Any) -> Any:
        found.append(len(directions))
        return compute(self, batch, parameters, directions)

    monkeypatch.setattr(Replay, "jacobian_products", counted)
    return found


def late(**options: Any) -> tuple[nn.Module, nn.Module, KFAC]:
    """Return an optimizer late in training, after a step in which everything was due."""
    model, loss_fn, opt = late_training(**options)
    opt._step._rollback.accept_(1e6)  # no loss counts as an explosion
    train_step(model, loss_fn, opt, image_batch(32, seed=0))
    return model, loss_fn, opt


def test_products_are_computed_at_fits_alone(products: list[int]) -> None:
    model, loss_fn, opt = late()
    counts = []
    for seed in range(1, 2 * FIT_PERIOD + 1):
        products.clear()
        train_step(model, loss_fn, opt, image_batch(32, seed=seed))
        counts.append(len(products))
    fits = [step for step, count in enumerate(counts, start=1) if count]
    assert 2 <= len(fits) <= 4  # gradients may have grown in between
    assert all(later - fit <= FIT_PERIOD for fit, later in pairwise([0, *fits]))


def test_a_fit_waits_for_an_inversion_that_is_near(products: list[int]) -> None:
    period = FIT_PERIOD + LONGEST_WAIT - 1
    model, loss_fn, opt = late(inverse_update_period=period)
    fits = []
    for step in range(1, 3 * period + 1):
        products.clear()
        train_step(model, loss_fn, opt, image_batch(32, seed=0))
        fits += [step] * bool(products)
    later = [step for step in fits if step > period]  # gradients may have grown before
    assert later == [2 * period, 3 * period]
    assert opt._step._reduction.adapted == opt._preconditioner.steps - 1


def test_a_step_between_fits_is_that_multiple_of_the_preconditioned_gradient() -> None:
    """The trust is a factor of the step, and the gradient is that of the new batch."""
    model, loss_fn, opt = late()
    for seed in range(1, FIT_PERIOD + 1):  # to a fit that the bound on changes does not shorten
        train_step(model, loss_fn, opt, image_batch(32, seed=seed))
    first = opt.statistics()
    assert first["predicted"] < 0
    for seed in range(20, 23):
        slow = {p: opt.state[p][BUFFER].clone() for p in model.parameters()}
        before = {p: p.detach().clone() for p in model.parameters()}
        train_step(model, loss_fn, opt, image_batch(32, seed=seed))
        found = opt.statistics()
        gradient = {n: p.grad for n, p in model.named_parameters()}
        direction = opt._preconditioner.precondition(gradient)
        for name, p in model.named_parameters():
            own = -found["step_size"] * direction[name]
            expected = own + found["momentum"] * slow[p]
            torch.testing.assert_close(p.detach() - before[p], expected, **EXACT)
        ratio = found["step_size"] / found["trust"]
        assert ratio == pytest.approx(first["step_size"] / first["trust"], rel=1e-9)


def settle(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> None:
    """Train until the slope grows no more from step to step, which would ask for another fit."""
    for _ in range(8):
        train_step(model, loss_fn, opt, image_batch(32, seed=0))


def heavier(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> None:
    x, y = image_batch(32, seed=0)
    opt.zero_grad()
    (16 * loss_fn(model(x), y)).backward()


def larger(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> None:
    x, y = image_batch(32, seed=0)
    opt.zero_grad()
    loss_fn(model(torch.cat([x, x, x])), torch.cat([y, y, y])).backward()


def twofold(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> None:
    opt.zero_grad()
    for seed in range(2):
        x, y = image_batch(16, seed=seed)
        (loss_fn(model(x), y) / 2).backward()


def decayed(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> None:
    opt.param_groups[0]["weight_decay"] = 0.01
    x, y = image_batch(32, seed=0)
    opt.zero_grad()
    loss_fn(model(x), y).backward()


@pytest.mark.parametrize("change", [heavier, larger, twofold, decayed])
def test_a_new_objective_is_fitted_anew(
    change: Callable[[nn.Module, nn.Module, KFAC], None], products: list[int]
) -> None:
    model, loss_fn, opt = late()
    settle(model, loss_fn, opt)
    products.clear()
    train_step(model, loss_fn, opt, image_batch(32, seed=0))
    assert not products
    change(model, loss_fn, opt)
    opt.step()
    assert products


@pytest.mark.parametrize(
    ("noise", "weight", "is_fitted"), [(0.0, 1.7, True), (1.0, 1.7, False), (1.0, 4.0, True)]
)
def test_a_slope_that_grows_is_fitted_anew(
    noise: float, weight: float, is_fitted: bool, products: list[int]
) -> None:
    """It grows with the square of the weight: threefold is no noise where batches agree."""
    model, loss_fn, opt = late()
    settle(model, loss_fn, opt)
    opt._step._fit.subspace.drop_()  # a fit is due
    before, (x, y) = [p.detach().clone() for p in model.parameters()], image_batch(32, seed=0)
    train_step(model, loss_fn, opt, (x, y))
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), before):
            parameter.copy_(kept)
    opt._step._agreement.drop_()
    opt._step._agreement.noise = noise
    products.clear()
    opt.zero_grad()
    (weight * loss_fn(model(x), y)).backward()
    opt.step()
    assert bool(products) == is_fitted


def test_new_inverses_are_fitted_to(products: list[int]) -> None:
    model, loss_fn, opt = late(inverse_update_period=4)
    settle(model, loss_fn, opt)
    running = [*opt._preconditioner.layers.values()]
    fitted, inverted = [], []
    for _ in range(FIT_PERIOD - 1):
        step = opt._preconditioner.steps
        products.clear()
        train_step(model, loss_fn, opt, image_batch(32, seed=0))
        fitted.append(bool(products))
        inverted.append({own.inverse_step for own in running} == {step})
    assert inverted == [step % 4 == 3 for step in range(FIT_PERIOD - 1)]
    assert fitted == inverted


@pytest.mark.parametrize("repeats", [True, False])
def test_the_slow_momentum_is_part_of_the_model_where_batches_repeat(
    repeats: bool, products: list[int]
) -> None:
    model, loss_fn, opt = late()
    counts = []
    for seed in range(1, 2 * FIT_PERIOD + 1):
        products.clear()
        train_step(model, loss_fn, opt, image_batch(32, seed=0 if repeats else seed))
        counts.append(sum(products))
    assert opt._step._agreement.noise < LARGEST_NOISE or not repeats
    assert {count for count in counts if count} == {2 if repeats else 1}


def test_a_given_momentum_is_fitted_in_every_step(products: list[int]) -> None:
    model, loss_fn, opt = late(momentum=0.5)
    for _ in range(3):
        products.clear()
        train_step(model, loss_fn, opt, image_batch(32, seed=0))
        assert products
