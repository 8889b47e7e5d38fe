"""The Levenberg-Marquardt rule, and rules that a user gives."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim import DampingRule, LevenbergMarquardt
from einconv_kfac.optim.step.agreement import LARGEST_NOISE
from einconv_kfac.optim.step.damping.levenberg_marquardt import (
    ADAPTATION,
    UNUSED_POWER,
)

NOISY = 0.5
LOW = {"damping": 1.0, "floor": 100.0}


@pytest.mark.parametrize(
    ("predicted", "ratio", "factor"),
    [
        (-1.0, 1.0, ADAPTATION),
        (-1.0, 2.0, ADAPTATION),
        (-1.0, 0.5, 1.0),
        (-1.0, 0.2, 1 / ADAPTATION),
        (-1.0, -1.0, 1 / ADAPTATION),
        (-1.0, math.nan, 1 / ADAPTATION),
        (1.0, 0.9, 1.0),
        (1.0, 3.0, 1 / ADAPTATION),
        (1.0, -1.0, 1 / ADAPTATION),
    ],
)
def test_the_damping_follows_the_ratio(predicted: float, ratio: float, factor: float) -> None:
    rule = LevenbergMarquardt()
    assert rule.damping(0) is None
    rule.load_state_dict({"damping": 2.0, "floor": 0.1})
    rule.after_ratio(ratio, predicted, NOISY)
    assert rule.damping(0) == pytest.approx(2 * factor)
    rule.load_state_dict({"damping": 0.1, "floor": 0.1})
    rule.after_ratio(ratio, predicted, NOISY)
    assert rule.damping(0) == pytest.approx(max(1.0, factor) * 0.1)
    is_failure = predicted < 0 and factor > 1  # raises the floor with the damping
    assert rule.floor == pytest.approx((factor if is_failure else 1.0) * 0.1)


def test_the_first_damping_follows_the_curvature_and_rejections_raise_the_floor() -> None:
    rule = LevenbergMarquardt()
    rule.after_rejection(2.0)
    rule.after_ratio(1.0, -1.0, NOISY)
    assert rule.damping(0) is None
    rule.initial(5.0)
    assert (rule.damping(0), rule.floor) == (pytest.approx(0.5), pytest.approx(0.01))
    rule.after_rejection(4.0)
    assert (rule.damping(0), rule.floor) == (pytest.approx(2.0), pytest.approx(0.04))


@pytest.mark.parametrize(
    ("ratio", "power"),
    [(0.9, 1), (1.0, 1), (1.5, (1 + UNUSED_POWER) / 2), (2.0, UNUSED_POWER), (9.0, UNUSED_POWER)],
)
def test_without_noise_the_damping_has_no_floor_and_shrinks_faster(
    ratio: float, power: float
) -> None:
    rule = LevenbergMarquardt()
    rule.load_state_dict(LOW)
    rule.after_ratio(ratio, -1.0, 0.0)
    assert rule.damping(0) == pytest.approx(ADAPTATION**power)
    rule.after_ratio(0.5, -1.0, 0.0)
    assert rule.damping(0) == pytest.approx(ADAPTATION**power)


def test_without_noise_the_damping_stays_above_the_rounding_of_the_curvature() -> None:
    rule, curvature = LevenbergMarquardt(), 3.0
    rule.initial(curvature)
    for _ in range(200):
        rule.after_ratio(2.0, -1.0, 0.0)
    damping, epsilon = rule.damping(0), torch.finfo(torch.float32).eps
    assert damping is not None
    assert 0.01 * epsilon * curvature < damping < epsilon * curvature


def test_a_damping_below_a_risen_floor_grows_to_it() -> None:
    rule = LevenbergMarquardt()
    rule.load_state_dict(LOW)
    grown = []
    for _ in range(20):
        rule.after_ratio(1.0, -1.0, LARGEST_NOISE / 10)  # a floor of 10
        grown.append(rule.damping(0))
    expected = [min(ADAPTATION**-count, 10.0) for count in range(1, 21)]
    assert grown == pytest.approx(expected)


def test_a_rejection_raises_the_floor_no_further_than_the_damping() -> None:
    rule = LevenbergMarquardt()
    for damping, floor in ((1.0, 100.0), (30.0, 100.0), (60.0, 120.0), (200.0, 200.0)):
        rule.load_state_dict({"damping": damping, "floor": 100.0})
        rule.after_rejection(2.0)
        assert (rule.damping(0), rule.floor) == (2 * damping, floor)


def badly_scaled(rows: int) -> tuple[Tensor, Tensor]:
    """Return columns of sizes from 1 to 1,000, and a linear function of them."""
    torch.manual_seed(0)
    scale = torch.logspace(0, 3, 6, dtype=torch.float64)
    x = torch.randn(rows, 6).double() * scale
    return x, (x / scale) @ torch.randn(6, 1).double() + 1


def test_a_batch_that_repeats_is_fitted_however_badly_scaled() -> None:
    """Its least squares solution has no error, in directions of any curvature."""
    model, loss_fn, batch = nn.Linear(6, 1).double(), nn.MSELoss(), badly_scaled(64)
    opt = KFAC(model, loss_fn)
    for _ in range(80):
        train_step(model, loss_fn, opt, batch)
    assert opt._step._rule.damping(0) < 1e-3 * opt._step._rule.floor
    assert float(loss_fn(model(batch[0]), batch[1]).detach()) < 1e-8


def test_batches_of_noise_keep_the_floor() -> None:
    """Targets share nothing, so that every step fits the noise of its batch."""
    torch.manual_seed(1)
    model, loss_fn = nn.Linear(6, 1).double(), nn.MSELoss()
    opt = KFAC(model, loss_fn)
    for _ in range(40):
        train_step(model, loss_fn, opt, (torch.randn(16, 6).double(), torch.randn(16, 1).double()))
    assert opt.statistics()["trust"] < 0.5
    assert opt.statistics()["damping"] >= opt._step._rule.floor


class Halving:
    """A rule of a user's: the damping is halved every step."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.ratios: list[float] = []

    def damping(self, step: int) -> float | None:
        return None if self.start is None else self.start / 2**step

    def initial(self, curvature: float) -> None:
        self.start = curvature

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None:
        assert 0 <= noise <= 1
        self.ratios.append(ratio)

    def after_rejection(self, factor: float) -> None:
        raise AssertionError("no step is rejected here")

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


def test_a_rule_of_a_user_sets_the_damping_and_is_saved() -> None:
    rule = Halving()
    assert isinstance(rule, DampingRule)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, damping=rule)
    dampings = []
    for _ in range(4):
        train_step(model, loss_fn, opt, image_batch(32))
        dampings.append(opt.statistics()["damping"])
    assert dampings == pytest.approx([dampings[0] / 2**step for step in range(4)])
    assert rule.ratios
    again_model, again = copy.deepcopy((model, opt))
    for each, own in ((model, opt), (again_model, again)):
        train_step(
            each,
            again._preconditioner.estimator.loss_fn if own is again else loss_fn,
            own,
            image_batch(32),
        )
    assert again.statistics() == opt.statistics()


def test_a_rule_is_refused_with_fixed_rates() -> None:
    with pytest.raises(ValueError, match="must be a number or a function of the step"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), lr=0.1, adaptive=False, damping=Halving())
