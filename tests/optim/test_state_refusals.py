"""Refused states and arguments: the words, what stays as it was, and each remedy, which trains."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim import LevenbergMarquardt
from einconv_kfac.optim.state_schema import NUMBER

Options = dict[str, Any]
LOSS_FN = nn.CrossEntropyLoss()
FIXED: Options = {"lr": 0.05, "adaptive": False}
SEEDS = range(3)


def made(**options: Any) -> tuple[nn.Module, KFAC]:
    model = conv_net()
    return model, KFAC(model, LOSS_FN, **options)


def trained(**options: Any) -> tuple[nn.Module, KFAC]:
    """A model that has taken steps."""
    model, opt = made(**options)
    for seed in SEEDS:
        train_step(model, LOSS_FN, opt, image_batch(seed=seed))
    return model, opt


def check_training(model: nn.Module, opt: KFAC, steps: int = 4) -> None:
    """The loss on one batch falls."""
    losses = [train_step(model, LOSS_FN, opt, image_batch()) for _ in range(steps)]
    assert losses[-1] < losses[0]


@dataclass(frozen=True)
class OtherState:
    """A state that an optimizer refuses.

    Args:
        words: What the message contains.
        saved: Arguments of the optimizer whose state it is.
        options: Arguments of the one that refuses it.
        remedied: Arguments with which the state loads, if there are any.
        saving: Arguments of `state_dict` with which it loads, if there are any.
        version: What is added to the version of the state.
    """

    words: str
    saved: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    remedied: Options | None = None
    saving: Options | None = None
    version: int = 0

    def state(self, opt: KFAC) -> dict[str, Any]:
        state = deepcopy(opt.state_dict())
        state["kfac"]["version"] += self.version
        return state


ALONE = "oad the state of the model alone"
STATES = {
    "an earlier version": OtherState(f"of version .* States of other .*: l{ALONE}", version=-1),
    "a later version": OtherState(f"of version .* States of other .*: l{ALONE}", version=1),
    "the fixed step": OtherState(f"got one of the fixed step.* L{ALONE}", saved=FIXED),
    "the automatic step": OtherState(f"got one of the automatic step.* L{ALONE}", options=FIXED),
    "another inverse": OtherState(
        f"got 'exact' for 'factored'. Pass inverse='exact', or l{ALONE}",
        saved={"inverse": "exact"},
        remedied={"inverse": "exact"},
    ),
    "other layers": OtherState(
        r"differs in 2\. Pass the arguments .*`exclude`\), or .* include_factors=False",
        saved={"exclude": ["2"]},
        remedied={"exclude": ["2"]},
        saving={"include_factors": False},
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_refused_state_changes_nothing(name: str) -> None:
    case = STATES[name]
    model, opt = trained(**case.options)
    before, state = weights(model), deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=case.words):
        opt.load_state_dict(case.state(trained(**case.saved)[1]))
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_the_model_alone_goes_on(name: str) -> None:
    case = STATES[name]
    source, _ = trained(**case.saved)
    model, opt = made(**case.options)
    model.load_state_dict(source.state_dict())
    check_training(model, opt)


@pytest.mark.parametrize("name", [name for name, case in STATES.items() if case.remedied])
def test_the_state_loads_with_its_own_arguments_and_goes_on_as_before(name: str) -> None:
    case = STATES[name]
    source, old = trained(**case.saved)
    model, opt = made(**(case.remedied or {}))
    model.load_state_dict(source.state_dict())
    opt.load_state_dict(case.state(old))
    for own, its in ((source, old), (model, opt)):
        train_step(own, LOSS_FN, its, image_batch(seed=9))
    assert torch.equal(weights(source), weights(model))


@pytest.mark.parametrize("name", [name for name, case in STATES.items() if case.saving])
def test_the_state_loads_as_it_is_to_be_saved(name: str) -> None:
    case = STATES[name]
    source, old = trained(**case.saved)
    model, opt = made(**case.options)
    model.load_state_dict(source.state_dict())
    opt.load_state_dict(old.state_dict(**(case.saving or {})))
    check_training(model, opt)


@dataclass(frozen=True)
class Argument:
    """Arguments that are refused.

    Args:
        words: What the message contains.
        options: The arguments.
        remedies: Arguments by the remedies that the message names.
    """

    words: str
    options: Options
    remedies: tuple[Options, ...]


ARGUMENTS = {
    "momentum that looks ahead": Argument(
        "`nesterov` must not be set .* Leave it out, or pass adaptive=False",
        {"lr": 0.05, "nesterov": True},
        ({"lr": 0.05}, {"lr": 0.05, "nesterov": True, "adaptive": False}),
    ),
    "products of a part": Argument(
        "`curvature_fraction` must be 1 .* Leave it out, or pass adaptive=True",
        {**FIXED, "curvature_fraction": 0.5},
        (FIXED, {"lr": 0.5, "adaptive": True, "curvature_fraction": 0.5}),
    ),
    "a safeguard with a damping": Argument(
        "`safeguard` must be False .* Leave `damping` out, and pass adaptive=True",
        {"safeguard": True, "damping": 0.1},
        ({"safeguard": True, "adaptive": True}, {"damping": 0.1}),
    ),
    "no learning rate": Argument(
        "`lr` must be given .* Pass `lr`, or adaptive=True",
        {"adaptive": False},
        (FIXED, {"adaptive": True}),
    ),
    "a class of rules": Argument(
        r"`damping` must be .* Pass an instance: LevenbergMarquardt\(\)",
        {"damping": LevenbergMarquardt},
        ({"damping": LevenbergMarquardt()},),
    ),
    "a rule for fixed rates": Argument(
        "`damping` must be a number .* Pass a number, or adaptive=True",
        {**FIXED, "damping": LevenbergMarquardt()},
        ({**FIXED, "damping": 0.1}, {"damping": LevenbergMarquardt(), "adaptive": True}),
    ),
    "squared gradients without gradients": Argument(
        "`fisher` must have gradients .* Pass another `fisher`, or inverse='exact'",
        {"inverse": "ekfac", "fisher": "forward-only"},
        (
            {"inverse": "ekfac", "fisher": "exact"},
            {"inverse": "exact", "fisher": "forward-only"},
        ),
    ),
    "the largest value": Argument(
        "`maximize` must be False when adaptive=True.* or pass adaptive=False",
        {"maximize": True},
        ({},),
    ),
    "a damping of zero": Argument(
        r"`damping` must be a number in \[1e-30, 1e\+18\), got 0",
        {"damping": 0},
        ({"damping": 1e-3},),
    ),
    "a decay of one": Argument(
        r"`factor_decay` must be a number in \[0, 1.0\), got 1",
        {"factor_decay": 1},
        ({"factor_decay": 0.99}, {"factor_decay": 0}),
    ),
    "a fraction above one": Argument(
        r"`factor_fraction` must be a number in \(0, 1\], got 1.5",
        {"factor_fraction": 1.5},
        ({"factor_fraction": 1}, {"factor_fraction": 0.5}),
    ),
    "a period of zero": Argument(
        "`factor_update_period` must be a positive integer, got 0",
        {"factor_update_period": 0},
        ({"factor_update_period": 1},),
    ),
    "an inverse that is none": Argument(
        r"`inverse` must be one of .*'factored'.*, got 'cholesky'",
        {"inverse": "cholesky"},
        ({"inverse": "factored"},),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refused_arguments_leave_no_hooks(name: str) -> None:
    case, model = ARGUMENTS[name], conv_net()
    with pytest.raises(ValueError, match=case.words):
        KFAC(model, LOSS_FN, **case.options)
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, case in ARGUMENTS.items() for i in range(len(case.remedies))]
)
def test_each_remedy_trains(name: str, index: int) -> None:
    check_training(*made(**ARGUMENTS[name].remedies[index]))


def test_the_negated_objective_is_maximised() -> None:
    """The remedy of ``maximize=True``, as its message has it."""
    model = conv_net()
    opt = KFAC(model)
    x, y = image_batch()
    found = []
    for _ in range(5):
        opt.zero_grad()
        objective = -nn.functional.cross_entropy(model(x), y)
        loss = opt.observe(-objective)
        loss.backward()
        opt.step()
        found.append(float(objective.detach()))
    assert found[-1] > found[0]


def test_fixed_rates_maximise() -> None:
    """The other remedy of ``maximize=True``."""
    model = conv_net()
    opt = KFAC(model, LOSS_FN, maximize=True, **FIXED)
    found = [train_step(model, LOSS_FN, opt, image_batch()) for _ in range(5)]
    assert found[-1] > found[0]


def test_an_integer_that_no_float_holds_is_a_number() -> None:
    NUMBER.check("'rule'.damping", 10**400)
    with pytest.raises(ValueError, match=r"a number at 'rule'\.damping, got True"):
        NUMBER.check("'rule'.damping", True)
