"""The automatic step: what follows when a step was wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einconv_kfac.optim.step.damping_search import SCALE_RANGE, Trials
from optim_cases import Batch, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step import automatic
from einconv_kfac.optim.step.automatic import ADAPTATION, ROUNDING, SHORTENING_DAMPS
from einconv_kfac.optim.step.backtracking import SHORTENING
from einconv_kfac.optim.step.objective import Objective

EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Sine(nn.Module):
    """Makes a loss that is far from quadratic."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


def wavy(**options: Any) -> tuple[nn.Sequential, nn.MSELoss, KFAC]:
    """Return a model and steps that are nearly twice too long for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), Sine(), nn.Linear(10, 2)).double()
    loss_fn = nn.MSELoss()
    return model, loss_fn, KFAC(model, loss_fn, lr=1.8, **options)


def wavy_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)


def grown(model: nn.Module, loss_fn: nn.Module, batch: Batch, before: float) -> bool:
    with torch.no_grad():
        return not float(loss_fn(model(batch[0]), batch[1])) <= before * (1 + ROUNDING)


def buffers(model: nn.Module, opt: KFAC) -> Tensor:
    """Return the momentum buffers as one vector."""
    return torch.cat([opt.state[p]["momentum_buffer"].flatten() for p in model.parameters()])


def test_a_step_is_shortened_until_its_own_loss_does_not_grow() -> None:
    """While every step is checked, as at first; the damping and its floor react."""
    model, loss_fn, opt = wavy()
    shortened = 0
    for seed in range(20):
        before, state, batch = weights(model), opt._step, wavy_batch(seed)
        damping, floor = state._damping, state._floor
        loss = train_step(model, loss_fn, opt, batch)
        assert not grown(model, loss_fn, batch, loss)
        torch.testing.assert_close(buffers(model, opt), weights(model) - before, **EXACT)
        if damping is not None and opt.statistics()["ratio"] < -1e-3:
            shortened += 1
            assert state._damping == pytest.approx(damping / ADAPTATION * SHORTENING_DAMPS)
            assert state._floor == pytest.approx(floor * SHORTENING_DAMPS)
    assert shortened > 0


def test_what_is_left_of_a_step_is_a_power_of_the_shortening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, statistics = image_batch(), []
    models = [conv_net(), conv_net()]
    again = Objective.value_again
    for model, refused in zip(models, (0, 2)):
        opt, calls = KFAC(model, nn.CrossEntropyLoss(), fisher="exact"), [0]

        def value(self: Objective, *rest: Any, n: int = refused, calls: Any = calls) -> Tensor:
            calls[0] += 1
            return again(self, *rest) + (math.inf if calls[0] <= n else 0.0)

        monkeypatch.setattr(Objective, "value_again", value)
        train_step(model, opt._preconditioner._estimator.loss_fn, opt, batch)
        assert calls == [refused + 1]
        statistics.append(opt.statistics())
    steps = [weights(model) - weights(conv_net()) for model in models]
    torch.testing.assert_close(steps[1], SHORTENING**2 * steps[0], **EXACT)
    sizes = [s["step_size"] for s in statistics]
    assert sizes[1] == pytest.approx(SHORTENING**2 * sizes[0])


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_step_that_no_shortening_helps_is_taken_back(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    before, damping = weights(model), opt._step._damping
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "value_again", lambda *_: torch.tensor(wrong).double())
        train_step(model, loss_fn, opt, image_batch())
    torch.testing.assert_close(weights(model), before, rtol=1e-12, atol=1e-12)
    assert not buffers(model, opt).any()
    assert opt.statistics()["step_size"] == 0
    assert opt._step._damping > SHORTENING_DAMPS * damping
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safeguard", [False, True])
def test_every_step_is_checked_if_wanted(safeguard: bool) -> None:
    model, loss_fn, opt = wavy(safeguard=safeguard)
    wrong = 0
    for seed in range(80):
        before, floor = weights(model), opt._step._floor
        loss = train_step(model, loss_fn, opt, batch := wavy_batch(seed))
        if "rejected" in opt.statistics():
            continue
        torch.testing.assert_close(buffers(model, opt), weights(model) - before, **EXACT)
        wrong += grown(model, loss_fn, batch, loss)
        if safeguard and seed and opt.statistics()["ratio"] < -1e-3:
            assert opt._step._floor == pytest.approx(SHORTENING_DAMPS * floor)
    assert (wrong > 0) is not safeguard


def test_a_check_of_a_good_step_changes_nothing() -> None:
    """Between adaptations the damping stays, so that training is the same with and without."""
    batches, found = [image_batch(24, seed=s) for s in range(60)], []
    for safeguard in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
        loss_fn = nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, safeguard=safeguard)
        ratios = []
        for batch in batches:
            train_step(model, loss_fn, opt, batch)
            ratios.append(opt.statistics()["ratio"])
        found.append(weights(model))
    assert min(ratios) > 0
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive": False, "lr": 0.1}, "must be False where adaptive=False or a `damping`"),
        ({"damping": 0.1}, "must be False where adaptive=False or a `damping` is given, got True"),
        ({"safeguard": 2}, "`safeguard` must be True or False, got 2"),
    ],
)
def test_checks_are_refused_where_nothing_could_react(
    options: dict[str, Any], message: str
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=message):
        KFAC(model, loss_fn, **{"safeguard": True, **options})
    assert not any(m._forward_hooks for m in [*model.modules(), loss_fn])


def test_a_given_damping_is_not_compared_with_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def value(*_: Any) -> Tensor:
        raise AssertionError("compared")

    monkeypatch.setattr(Objective, "value_again", value)
    model, loss_fn, opt = wavy(damping=1e-4)
    wrong = 0
    for seed in range(60):
        loss = train_step(model, loss_fn, opt, batch := wavy_batch(seed))
        wrong += grown(model, loss_fn, batch, loss)
        assert opt.statistics()["damping"] == 1e-4
    assert wrong > 0


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
    step = KFAC(conv_net(), nn.CrossEntropyLoss())._step
    step._damping, step._floor, step.ratio = 2.0, 0.1, ratio
    step._follow_ratio_(predicted)
    assert step._damping == pytest.approx(2 * factor)
    step._damping = step._floor
    step._follow_ratio_(predicted)
    assert step._damping == pytest.approx(max(1.0, factor) * step._floor)


class Ranked:
    """Stands for a step of which only the promise is known."""

    def __init__(self, rank: float) -> None:
        self.rank = rank


@pytest.mark.parametrize(
    ("promised", "tried", "best"),
    [
        ({1: -1.0}, [1, 3, 1 / 3], 1),  # neither helps
        ({1: -1.0, 3: -2.0, 9: -1.5}, [1, 3, 9], 3),  # larger helps, smaller is not tried
        ({1: -1.0, 1 / 3: -2.0, 1 / 9: -3.0}, [1, 3, 1 / 3, 1 / 9, 1 / 27], 1 / 9),
        ({1: math.inf, 3: math.inf, 1 / 3: -1.0}, [1, 3, 1 / 3, 1 / 9], 1 / 3),
    ],
)
def test_trials_go_on_as_long_as_they_help(
    promised: dict[float, float], tried: list[float], best: float
) -> None:
    trials: Any = Trials(1.0)
    found = []
    for scale in trials.scales():
        found.append(scale)
        ranks = [rank for known, rank in promised.items() if math.isclose(known, scale)]
        trials.add_((Ranked(ranks[0] if ranks else 0.0), scale, {}))
    assert found == pytest.approx(tried)
    assert trials.best()[1] == pytest.approx(best)


def test_trials_stay_within_their_range() -> None:
    trials: Any = Trials(1.0)
    for scale in trials.scales():
        assert SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]
        trials.add_((Ranked(-scale), scale, {}))
    assert 3 * trials.best()[1] > SCALE_RANGE[1]


def test_trials_are_due_early_and_then_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, kept = [], automatic.AutomaticStep._best_trial

    def noted(self: Any, *rest: Any) -> Any:
        steps.append(self._preconditioner.steps)
        return kept(self, *rest)

    monkeypatch.setattr(automatic.AutomaticStep, "_best_trial", noted)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for seed in range(20):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert steps == [0, 1, 2, 3, 5, 9, 17]
