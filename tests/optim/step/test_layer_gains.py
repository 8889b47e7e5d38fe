"""How far steps are followed: when gains grow and shrink, layer by layer."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.layer_gains import (
    CONFIDENT,
    FIRST,
    GROWTH,
    LARGEST,
    LEAST_LATER,
    SHRINKAGE,
    SMALLEST,
    Gains,
)
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.slow_momentum import BUFFER, SlowMomentum
from einconv_kfac.optim.vectors import layer_of

WEIGHT = 0.01


def learned(gradients: dict[str, list[float]], size: float = 100.0, count: int = 1) -> Gains:
    """Return gains after batches with a gradient along the past (first) and the step (second)."""
    gains = Gains()
    momentum = {n: torch.tensor([1.0, 0.0]) for n in gradients}
    update = {n: torch.tensor([0.0, 0.1]) for n in gradients}
    parameters = {n: torch.tensor([size, 0.0]) for n in gradients}
    slopes = {n: torch.tensor(g) for n, g in gradients.items()}
    objective = Objective([], parameters, slopes, {}, dict.fromkeys(gradients, 1.0), {}, {})
    gains.learn_(objective, {}, update, WEIGHT, 0.5)
    for _ in range(count):
        gains.learn_(objective, momentum, update, WEIGHT, 0.5)
    return gains


@pytest.mark.parametrize(
    ("ascent", "size", "grows"),
    [
        (-1.0, 100.0, True),
        (-1.0, 1.0, True),  # batches ask for it, however small the parameters are
        (5e-5, 100.0, True),  # less than noise would make of it
        (5e-5, 1.0, False),
        (1e-2, 100.0, False),
    ],
)
def test_a_gain_grows_where_steps_were_too_short_or_noise_is_small(
    ascent: float, size: float, grows: bool
) -> None:
    gains = learned({"a.weight": [ascent, -1.0]}, size)
    assert gains.mean == pytest.approx(FIRST * exp(WEIGHT * (GROWTH if grows else -SHRINKAGE)))


@pytest.mark.parametrize(("ascent", "limit"), [(-1.0, LARGEST), (5e-5, CONFIDENT), (1.0, SMALLEST)])
def test_gains_have_limits(ascent: float, limit: float) -> None:
    gains = learned({"a.weight": [ascent, -1.0]}, count=2_000)
    assert gains.mean == pytest.approx(limit, rel=SHRINKAGE * WEIGHT)
    assert gains.later("a", 0.2) == pytest.approx(gains.mean - 0.2)
    assert gains.later("a", 16.0) == LEAST_LATER


def test_layers_have_gains_of_their_own() -> None:
    both = {"a.weight": [-1.0, 0.0], "b.weight": [1.0, 0.0], "b.bias": [0.5, 0.0]}
    gains = learned(both, count=50)
    assert gains.later("a", 0.0) > FIRST > gains.later("b", 0.0)
    assert layer_of("a.b.weight") == "a.b"


def test_a_state_is_that_of_the_layers() -> None:
    gains, other = learned({"a.weight": [-1.0, 0.0]}, count=3), Gains()
    other.load_state_dict(gains.state_dict())
    assert other.state_dict() == gains.state_dict()
    assert other.later("a", 0.0) == gains.later("a", 0.0)


def test_what_was_learned_is_dropped_with_the_momentum() -> None:
    memory: dict[str, dict[str, Any]] = {"w": {}}
    point: dict[str, Tensor] = {"w": torch.ones(2)}
    slow = SlowMomentum()
    for _ in range(20):
        update = {"w": torch.full((2,), 0.25)}
        slope = {"w": torch.full((2,), -1.0)}
        slow.follow_(Objective([], point, slope, {}, {"w": 1.0}, {}, {}), update, memory, 1.0)
    assert slow.gains.mean > FIRST
    slow.drop_(memory)
    assert slow.gains.mean == FIRST
    assert BUFFER not in memory["w"]


def test_batches_of_one_kind_are_followed_further_than_noise() -> None:
    """The same images with true labels, and with labels that change at random."""
    found = []
    for noisy in (False, True):
        torch.manual_seed(0)
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn)
        for seed in range(40):
            x, y = image_batch(seed=0)
            drawn = torch.randint(len(y), (len(y),), generator=torch.Generator().manual_seed(seed))
            train_step(model, loss_fn, opt, (x, y[drawn] if noisy else y))
        found.append(float(opt.statistics()["gain"]))
    assert found[0] > found[1]
