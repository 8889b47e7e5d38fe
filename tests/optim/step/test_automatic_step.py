"""The automatic step: what follows when a step was wrong."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import Batch, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.comparison.backtracking import BACKTRACKING_FACTOR
from einconv_kfac.optim.step.comparison.reduction import BACKTRACKED_FACTOR, RELATIVE_ROUNDING
from einconv_kfac.optim.step.damping.levenberg_marquardt import ADAPTATION
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER

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
        return not float(loss_fn(model(batch[0]), batch[1])) <= before * (1 + RELATIVE_ROUNDING)


def buffers(model: nn.Module, opt: KFAC) -> Tensor:
    """Return the momentum buffers as one vector."""
    return torch.cat([opt.state[p]["momentum_buffer"].flatten() for p in model.parameters()])


def test_a_step_is_shortened_until_its_own_loss_does_not_grow() -> None:
    """While every step is checked, as at first; the damping and its floor react."""
    model, loss_fn, opt = wavy()
    shortened = 0
    for seed in range(12):
        before, state, batch = weights(model), opt._step, wavy_batch(seed)
        damping, floor = state._rule.damping(0), state._rule.floor
        slow = {p: opt.state[p][BUFFER].clone() for p in model.parameters() if opt.state[p]}
        loss = train_step(model, loss_fn, opt, batch)
        followed = opt.param_groups[0]["lr"] * opt.statistics()["momentum"]
        alone = deepcopy(model)  # after the step without the slow momentum
        for own, p in zip(alone.parameters(), model.parameters()):
            own.data -= followed * slow.get(p, torch.zeros(()))
        assert not grown(alone, loss_fn, batch, loss)
        torch.testing.assert_close(buffers(model, opt), weights(model) - before, **EXACT)
        if damping is not None and opt.statistics()["ratio"] < -1e-3:
            shortened += 1
            assert state._rule.damping(0) == pytest.approx(
                damping / ADAPTATION * BACKTRACKED_FACTOR
            )
            for factor in (1 / ADAPTATION, BACKTRACKED_FACTOR):
                damping *= factor
                floor = max(floor, min(floor * factor, damping))
            assert state._rule.floor == pytest.approx(floor)
    assert shortened > 0


def test_a_step_that_is_fitted_before_a_comparison_is_due_is_compared() -> None:
    """Another number of examples is fitted at once, late in training too."""
    model, loss_fn, opt = wavy()
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000  # fits and comparisons are rare by then
    opt.load_state_dict(state)
    reduction = opt._step._reduction
    early = shortened = 0
    for seed in range(14):
        before, adapted, reduction.ratio = weights(model), reduction.adapted, math.nan
        x, y = (tensor[: 6 if seed % 2 else 16] for tensor in wavy_batch(seed))
        slow = {p: opt.state[p][BUFFER].clone() for p in model.parameters() if opt.state[p]}
        loss = train_step(model, loss_fn, opt, (x, y))
        assert not math.isnan(reduction.ratio)
        alone = deepcopy(model)  # after the step without the slow momentum
        followed = opt.param_groups[0]["lr"] * opt.statistics()["momentum"]
        for own, p in zip(alone.parameters(), model.parameters()):
            own.data -= followed * slow.get(p, torch.zeros(()))
        assert not grown(alone, loss_fn, (x, y), loss)
        torch.testing.assert_close(buffers(model, opt), weights(model) - before, **EXACT)
        early += reduction.adapted == adapted
        shortened += reduction.adapted == adapted and reduction.ratio < -0.01
    assert early > shortened > 0


def test_what_is_left_of_a_step_is_a_power_of_the_shortening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, statistics = image_batch(), []
    models = [conv_net(), conv_net()]
    again = Replay.batch_loss
    for model, refused in zip(models, (0, 2)):
        opt, calls = KFAC(model, nn.CrossEntropyLoss(), fisher="exact"), [0]

        def value(self: Replay, *rest: Any, n: int = refused, calls: Any = calls) -> Tensor:
            calls[0] += 1
            return again(self, *rest) + (math.inf if calls[0] <= n else 0.0)

        monkeypatch.setattr(Replay, "batch_loss", value)
        train_step(model, opt._preconditioner.estimator.loss_fn, opt, batch)
        assert calls == [refused + 1]
        statistics.append(opt.statistics())
    steps = [weights(model) - weights(conv_net()) for model in models]
    torch.testing.assert_close(steps[1], BACKTRACKING_FACTOR**2 * steps[0], **EXACT)
    sizes = [s["step_size"] for s in statistics]
    assert sizes[1] == pytest.approx(BACKTRACKING_FACTOR**2 * sizes[0])


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_step_that_no_shortening_helps_is_taken_back(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    before, damping = weights(model), opt._step._rule.damping(0)
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "batch_loss", lambda *_: torch.tensor(wrong).double())
        train_step(model, loss_fn, opt, image_batch())
    torch.testing.assert_close(weights(model), before, rtol=1e-12, atol=1e-12)
    assert not buffers(model, opt).any()
    assert opt.statistics()["step_size"] == 0
    assert opt._step._rule.damping(0) > BACKTRACKED_FACTOR * damping
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safeguard", [False, True])
def test_every_step_is_checked_if_wanted(safeguard: bool) -> None:
    model, loss_fn, opt = wavy(safeguard=safeguard)
    wrong = 0
    for seed in range(40):
        before, floor = weights(model), opt._step._rule.floor
        loss = train_step(model, loss_fn, opt, batch := wavy_batch(seed))
        if "rejected" in opt.statistics():
            continue
        torch.testing.assert_close(buffers(model, opt), weights(model) - before, **EXACT)
        wrong += grown(model, loss_fn, batch, loss)
        if safeguard and seed and opt.statistics()["ratio"] < -1e-3:
            factor = BACKTRACKED_FACTOR / ADAPTATION
            highest = min(factor * floor, opt._step._rule.damping(0))
            assert opt._step._rule.floor == pytest.approx(max(floor, highest))
    assert (wrong > 0) is not safeguard


def test_a_check_of_a_good_step_changes_nothing() -> None:
    """Between adaptations the damping stays, so that training is the same with and without."""
    batches, found = [image_batch(24, seed=s) for s in range(25)], []
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

    monkeypatch.setattr(Replay, "batch_loss", value)
    model, loss_fn, opt = wavy(damping=1e-4)
    wrong = 0
    for seed in range(30):
        loss = train_step(model, loss_fn, opt, batch := wavy_batch(seed))
        wrong += grown(model, loss_fn, batch, loss)
        assert opt.statistics()["damping"] == 1e-4
    assert wrong > 0
