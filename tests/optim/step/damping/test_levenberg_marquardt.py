"""The Levenberg-Marquardt rule, and rules that a user gives."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from optim_cases import conv_net, image_batch, train_step
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim import DampingRule, LevenbergMarquardt
from einconv_kfac.optim.step.damping.levenberg_marquardt import ADAPTATION


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
    rule.after_ratio(ratio, predicted)
    assert rule.damping(0) == pytest.approx(2 * factor)
    rule.load_state_dict({"damping": 0.1, "floor": 0.1})
    rule.after_ratio(ratio, predicted)
    assert rule.damping(0) == pytest.approx(max(1.0, factor) * 0.1)
    assert rule.state_dict()["floor"] == 0.1


def test_the_first_damping_follows_the_curvature_and_rejections_raise_the_floor() -> None:
    rule = LevenbergMarquardt()
    rule.after_rejection(2.0)
    rule.after_ratio(1.0, -1.0)
    assert rule.damping(0) is None
    rule.initial(5.0)
    assert (rule.damping(0), rule.floor) == (pytest.approx(0.5), pytest.approx(0.05))
    rule.after_rejection(4.0)
    assert (rule.damping(0), rule.floor) == (pytest.approx(2.0), pytest.approx(0.2))


class Halving:
    """A rule of a user's: the damping is halved every step."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.ratios: list[float] = []

    def damping(self, step: int) -> float | None:
        return None if self.start is None else self.start / 2**step

    def initial(self, curvature: float) -> None:
        self.start = curvature

    def after_ratio(self, ratio: float, predicted: float) -> None:
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
