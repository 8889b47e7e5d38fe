"""How far steps are followed: when gains grow and shrink, layer by layer."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, objective_of, train_step
from torch import nn

from einconv_kfac import KFAC
from einconv_kfac.optim.step.momentum.layer_gains import (
    CONFIDENT_GAIN,
    FIRST_GAIN,
    GROWTH_RATE,
    LARGEST_GAIN,
    SHRINKAGE_RATE,
    SMALLEST_GAIN,
    SMALLEST_REMAINDER,
    LayerGains,
    mean_gain,
)
from einconv_kfac.optim.step.momentum.layer_products import layer_products
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER, SlowMomentum
from einconv_kfac.optim.vectors import layer_of

WEIGHT = 0.01


def adapted(gradients: dict[str, list[float]], size: float = 100.0, count: int = 1) -> LayerGains:
    """Return gains after batches with a gradient along the past (first) and the step (second)."""
    gains = LayerGains()
    momentum = {n: torch.tensor([1.0, 0.0]) for n in gradients}
    update = {n: torch.tensor([0.0, 0.1]) for n in gradients}
    parameters = {n: torch.tensor([size, 0.0]) for n in gradients}
    slopes = {n: torch.tensor(g) for n, g in gradients.items()}
    gains.adapt_(layer_products((parameters, slopes), {}, update), WEIGHT, 0.5)
    for _ in range(count):
        gains.adapt_(layer_products((parameters, slopes), momentum, update), WEIGHT, 0.5)
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
    gains = adapted({"a.weight": [ascent, -1.0]}, size)
    assert mean_gain(gains.by_layer) == pytest.approx(
        FIRST_GAIN * exp(WEIGHT * (GROWTH_RATE if grows else -SHRINKAGE_RATE))
    )


@pytest.mark.parametrize(
    ("ascent", "limit"), [(-1.0, LARGEST_GAIN), (5e-5, CONFIDENT_GAIN), (1.0, SMALLEST_GAIN)]
)
def test_gains_have_limits(ascent: float, limit: float) -> None:
    gains = adapted({"a.weight": [ascent, -1.0]}, count=2_000)
    assert mean_gain(gains.by_layer) == pytest.approx(limit, rel=SHRINKAGE_RATE * WEIGHT)
    point = {"a.weight": torch.ones(2)}
    for trust in (0.2, 16.0):
        remainders = gains.adapt_(layer_products((point, point), {}, point), WEIGHT, trust)
        expected = max(mean_gain(gains.by_layer) - trust, SMALLEST_REMAINDER)
        assert remainders == {"a": pytest.approx(expected)}


def test_layers_have_gains_of_their_own() -> None:
    both = {"a.weight": [-1.0, 0.0], "b.weight": [1.0, 0.0], "b.bias": [0.5, 0.0]}
    gains = adapted(both, count=50)
    assert gains.by_layer["a"] > FIRST_GAIN > gains.by_layer["b"]
    assert layer_of("a.b.weight") == "a.b"


def test_a_state_is_that_of_the_layers() -> None:
    gains, other = adapted({"a.weight": [-1.0, 0.0]}, count=3), LayerGains()
    other.load_state_dict(gains.state_dict())
    assert other.state_dict() == gains.state_dict()
    assert other.by_layer == gains.by_layer


def test_what_was_learned_is_dropped_with_the_momentum() -> None:
    memory: dict[str, dict[str, Any]] = {"w": {}}
    point = {"w": torch.ones(2)}
    slow = SlowMomentum()
    for _ in range(20):
        update = {"w": torch.full((2,), 0.25)}
        slope = {"w": torch.full((2,), -1.0)}
        slow.add_(objective_of(point, gradient=slope, memory=memory), update, 1.0)
    assert mean_gain(slow.gains.by_layer) > FIRST_GAIN
    slow.drop_(memory)
    assert mean_gain(slow.gains.by_layer) == FIRST_GAIN
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
