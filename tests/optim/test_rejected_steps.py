"""Dampings that change, faults that are noticed, and steps that are undone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.step.automatic import UNDONE_FACTOR
from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel
from einconv_kfac.optim.vectors import norms


def test_a_damping_grows_when_the_model_promises_too_much() -> None:
    """A cubic step down: the loss falls far less than the quadratic model says."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, lr=6.0)  # six times the best step
    train_step(model, loss_fn, opt, image_batch())
    first = opt._step._rule.damping(0)
    train_step(model, loss_fn, opt, image_batch())
    assert opt._step._rule.damping(0) > first


def test_a_damping_shrinks_when_the_model_is_right() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    model, loss_fn = nn.Linear(5, 2).double(), nn.MSELoss()
    opt = KFAC(model, loss_fn, fisher="exact")
    dampings = []
    for _ in range(5):
        train_step(model, loss_fn, opt, (x, y))
        dampings.append(opt._step._rule.damping(0))
    assert all(b < a for a, b in pairwise(dampings))


def test_a_damping_of_the_inverses_follows_what_the_quadratic_model_prefers() -> None:
    """With curvature that K-FAC reproduces exactly, less damping always promises more."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    model, loss_fn = nn.Linear(5, 2).double(), nn.MSELoss()
    opt = KFAC(model, loss_fn, fisher="exact")
    for _ in range(3):
        train_step(model, loss_fn, opt, (x, y))
    assert opt._step._fit.search.scale < 0.5


def test_a_damping_that_is_given_is_used_as_given() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, damping=0.3)
    for seed in range(4):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert opt.statistics()["damping"] == 0.3
    assert opt._step._fit.search.scale == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_noticed_and_large_ones_pass(value: float) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    preconditioner = KFAC(model, loss_fn)._preconditioner
    large = torch.full((3,), 1e308, dtype=torch.float64)  # finite, but the sum overflows
    for fault, gradient in (
        (None, {"a": torch.ones(2), "b": large}),
        ("The gradient of 'b'", {"a": torch.ones(2), "b": torch.tensor([1.0, value])}),
        ("The gradient of 'c'", {"c": torch.tensor([value, -value])}),
    ):
        known = norms(gradient.values())
        assert preconditioner.collector.not_finite(gradient, [], known) == fault
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    assert preconditioner.collector.not_finite({}, [], []) is None
    moments = preconditioner.collector.moments["2"]
    moments.sums()[0].fill_(value)
    assert preconditioner.collector.not_finite({}, [], []) == "A Kronecker factor of '2'"
    losses = [torch.tensor(0.5), torch.tensor(value)]
    assert preconditioner.collector.not_finite({}, losses, []) == "The loss"


@pytest.mark.parametrize("given", [None, 0.1])
def test_a_step_after_which_the_loss_explodes_is_undone(given: float | None) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, damping=given)
    train_step(model, loss_fn, opt, image_batch())
    before = weights(model)
    train_step(model, loss_fn, opt, image_batch())
    damping = opt._step._rule.damping(0) if given is None else given
    x, y = image_batch()
    loss = 100 * loss_fn(model(x), y)
    loss.backward()
    opt.step()
    torch.testing.assert_close(weights(model), before, rtol=1e-12, atol=1e-12)
    assert opt.statistics()["rejected"] == 1
    assert opt.statistics()["damping"] == pytest.approx(UNDONE_FACTOR * damping)


@pytest.mark.parametrize("damping", [None, 0.1])
def test_a_step_after_which_the_model_is_not_finite_is_undone(
    damping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, damping=damping)
    train_step(model, loss_fn, opt, image_batch())
    before, change = weights(model), QuadraticModel.bend
    train_step(model, loss_fn, opt, image_batch())
    with monkeypatch.context() as patch:
        patch.setattr(QuadraticModel, "bend", lambda *arguments: change(*arguments) * math.inf)
        with pytest.warns(RuntimeWarning, match="quadratic model was not finite"):
            train_step(model, loss_fn, opt, image_batch())  # there is a step to undo
        for _ in range(3):  # there is none, and no further warning
            start = opt.statistics()["damping"]
            torch.testing.assert_close(weights(model), before, rtol=1e-12, atol=1e-12)
            train_step(model, loss_fn, opt, image_batch())
            assert opt.statistics()["damping"] > 3 * start
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_given_damping_returns_to_what_was_given() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt, dampings = KFAC(model, loss_fn, damping=0.1), []
    for step in range(40):
        opt.zero_grad()
        loss = (100 if step == 2 else 1) * loss_fn(model(image_batch()[0]), image_batch()[1])
        loss.backward()
        opt.step()
        dampings.append(opt.statistics()["damping"])
    assert dampings[:2] == [0.1, 0.1]
    assert dampings[2] == pytest.approx(0.4)
    assert dampings[3:] == sorted(dampings[3:], reverse=True)
    assert dampings[-1] == 0.1


@pytest.mark.parametrize("damping", [None, 0.1])
def test_a_step_that_would_change_everything_is_a_failure(
    damping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt, before = KFAC(model, loss_fn, damping=damping), weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(RunningCurvature, "relative_change", lambda *_: torch.tensor(math.inf))
        with pytest.warns(RuntimeWarning, match="change nothing or everything"):
            train_step(model, loss_fn, opt, image_batch())
        first = opt.statistics()["damping"]
        train_step(model, loss_fn, opt, image_batch())
    assert opt.statistics()["damping"] > 3 * first
    assert torch.equal(weights(model), before)
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_step_without_length_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt, before = KFAC(model, loss_fn, damping=0.1), weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(QuadraticModel, "minimum", lambda own, *_: 0 * own.slope)
        with pytest.warns(RuntimeWarning, match="change nothing or everything"):
            train_step(model, loss_fn, opt, image_batch())
    assert torch.equal(weights(model), before)
    train_step(model, loss_fn, opt, image_batch())
    assert 0.1 < opt.statistics()["damping"] < 0.4


def test_labels_without_meaning_do_no_harm() -> None:
    torch.manual_seed(0)
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    losses = []
    for _ in range(90):
        x, y = torch.randn_like(image_batch(12)[0]), torch.randint(3, (12,))
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert sorted(losses[-40:])[20] < 3
