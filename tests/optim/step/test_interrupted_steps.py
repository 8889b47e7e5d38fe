"""Steps that are interrupted: parameters and state are as they were, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.optim import LevenbergMarquardt

MODES: list[dict[str, Any]] = [
    {"weight_decay": 1e-2},
    {"safeguard": True},
    {"inverse": "exact"},
    {"inverse": "ekfac", "inverse_update_period": 1, "factor_update_period": 1},
    {"lr": 0.1, "adaptive": False, "nesterov": True},
    {"lr": 0.1, "adaptive": False, "decoupled_weight_decay": True, "weight_decay": 0.1},
]


class Interruption(BaseException):
    """What an interrupt from the keyboard is like."""


ERRORS = {0: Interruption, 2: torch.OutOfMemoryError, 5: Interruption}
"""What fails, by the number of steps before."""


class Fuse:
    """Fails at one of the calls of a function.

    Args:
        error: What it raises.
        is_late: Whether the function has returned by then.
    """

    def __init__(self, error: type[BaseException], is_late: bool = False) -> None:
        self.calls, self.at, self.error, self.is_late = 0, -1, error, is_late

    def armed(self, at: int) -> None:
        """Count from now on, and fail at a call; never for a negative number."""
        self.calls, self.at = 0, at

    def burn(self, is_late: bool) -> None:
        """Count a call, before it or after it."""
        self.calls += is_late == self.is_late
        if is_late == self.is_late and self.calls == self.at:
            raise self.error("no")


class Net(nn.Module):
    """A network whose forward passes may fail."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Dropout(0.3), nn.PReLU(2)]
        self.inner = nn.Sequential(*first, nn.Flatten(), nn.Linear(8, 3)).double()
        self.fuse = fuse

    def forward(self, x: Tensor) -> Tensor:
        self.fuse.burn(is_late=False)
        result: Tensor = self.inner(x)
        self.fuse.burn(is_late=True)
        return result

    def __deepcopy__(self, memo: Any) -> Net:
        made = Net(self.fuse)
        made.load_state_dict(self.state_dict())
        return made


def trained(fuse: Fuse, steps: int, **options: Any) -> tuple[Net, nn.Module, KFAC]:
    """A model that has taken steps."""
    model, loss_fn = Net(fuse), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for seed in range(steps):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    opt.zero_grad()
    return model, loss_fn, opt


FIRST_AND_LATER = [
    *((options, 0, index % 2 == 0) for index, options in enumerate(MODES)),
    *((options, (2, 5)[index // 2 % 2], index % 2 == 1) for index, options in enumerate(MODES)),
]
"""Each mode at its first step and at a later one, with errors after a call and before it."""


@pytest.mark.parametrize(("options", "steps", "is_late"), FIRST_AND_LATER)
def test_every_evaluation_may_fail(options: dict[str, Any], steps: int, is_late: bool) -> None:
    """At each call in turn, until a step is over before it comes to the call."""
    fuse = Fuse(ERRORS[steps], is_late)
    model, loss_fn, opt = trained(fuse, steps, **options)
    before, state, random = weights(model), deepcopy(opt.state_dict()), torch.get_rng_state()
    x, y = image_batch(seed=steps)
    for at in count(1):
        torch.set_rng_state(random)
        loss_fn(model(x), y).backward()
        fuse.armed(at)
        try:
            opt.step()
        except fuse.error:
            assert torch.equal(before, weights(model))
            assert_same(state, opt.state_dict())
            opt.zero_grad()
            fuse.armed(-1)
            continue
        break
    assert at > 1 or not options.get("adaptive", True)
    expected = trained(Fuse(Interruption), steps, **options)
    torch.set_rng_state(random)
    train_step(*expected, (x, y))
    assert torch.equal(weights(model), weights(expected[0]))
    assert_same(opt.state_dict()["kfac"], expected[2].state_dict()["kfac"])


class FailingRule(LevenbergMarquardt):
    """A damping rule that fails after it has changed."""

    fails = False

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None:
        super().after_ratio(ratio, predicted, noise)
        if self.fails:
            raise Interruption


def test_a_damping_rule_that_fails_changes_nothing() -> None:
    rule = FailingRule()
    model, loss_fn, opt = trained(Fuse(Interruption), 5, damping=rule)
    before, state = weights(model), deepcopy(opt.state_dict())
    rule.fails = True
    with pytest.raises(Interruption):
        train_step(model, loss_fn, opt, image_batch(seed=5))
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())


@pytest.mark.parametrize("options", MODES)
def test_an_error_of_the_log_comes_after_the_whole_step(options: dict[str, Any]) -> None:
    fuse = Fuse(Interruption)
    model, loss_fn, opt = trained(fuse, 2, **options)

    def log(step: int, _: dict[str, float]) -> None:
        if step == 2:
            raise Interruption

    logged_model = Net(fuse)
    logged = KFAC(logged_model, loss_fn, log_to=log, **options)
    logged_model.load_state_dict(model.state_dict())
    logged.load_state_dict(deepcopy(opt.state_dict()))
    random = torch.get_rng_state()
    train_step(model, loss_fn, opt, image_batch(seed=2))
    torch.set_rng_state(random)
    with pytest.raises(Interruption):
        train_step(logged_model, loss_fn, logged, image_batch(seed=2))
    assert torch.equal(weights(model), weights(logged_model))
    assert_same(opt.state_dict(), logged.state_dict())


@pytest.mark.parametrize("options", [*MODES, {"inverse_in_background": True}])
def test_a_schedule_that_fails_changes_nothing(options: dict[str, Any]) -> None:
    def decay(step: int) -> float:
        if step == 3:
            raise Interruption
        return 0.9

    model, loss_fn, opt = trained(Fuse(Interruption), 2, factor_decay=decay, **options)
    before, state = weights(model), deepcopy(opt.state_dict())
    with pytest.raises(Interruption):
        train_step(model, loss_fn, opt, image_batch(seed=5))
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())


def singular(opt: Any, find: Callable[[Any], dict[str, Any]], name: str) -> None:
    """Make the running factors of a layer indefinite, beyond what any damping mends."""
    state = deepcopy(opt.state_dict())
    factors = find(state)["layers"][name]["factors"]
    for factor in factors:
        unit = torch.eye(factor.shape[-1], dtype=factor.dtype)
        factor.copy_(1e30 * (1.99 * unit - 0.99))  # all minors of two rows are positive
    opt.load_state_dict(state)


@pytest.mark.parametrize("options", [MODES[0], MODES[4]])
def test_a_failed_inversion_changes_nothing(options: dict[str, Any]) -> None:
    periods = {"inverse_update_period": 1, "factor_update_period": 1}
    model, loss_fn, opt = trained(Fuse(Interruption), 3, **options, **periods)
    singular(opt, lambda state: state["kfac"]["preconditioner"], "inner.0")
    before, state = weights(model), deepcopy(opt.state_dict())
    for seed in (3, 4):
        opt.zero_grad()
        with pytest.raises(RuntimeError, match=r"damped factor . of 'inner.0' must be positive"):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        assert torch.equal(before, weights(model))
        assert_same(state, opt.state_dict())


def test_a_failed_inversion_of_a_preconditioner_changes_nothing() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    periods = {"inverse_update_period": 1, "factor_update_period": 1}
    preconditioner = KFACPreconditioner(model, loss_fn, **periods)
    x, y = image_batch()
    for _ in range(2):
        loss_fn(model(x), y).backward()
        preconditioner.step()
    singular(preconditioner, lambda state: state, "0")
    state = deepcopy(preconditioner.state_dict())
    model.zero_grad()
    loss_fn(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="must be positive definite"):
        preconditioner.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters()))
    assert_same(state, preconditioner.state_dict())
