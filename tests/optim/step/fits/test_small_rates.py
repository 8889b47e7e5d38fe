"""Learning rates of other optimizers in the automatic step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from einconv_kfac import KFAC

MESSAGE = "The learning rate was"


def train(rate: Callable[[int], float], *, steps: int = 12) -> list[str]:
    """Train with learning rates by step, and return the warnings about them."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn)
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    return [str(own.message) for own in caught if MESSAGE in str(own.message)]


@pytest.mark.parametrize("rate", [lambda _: 6e-4, lambda step: 6e-4 * min(1, step / 5)])
def test_rates_of_another_optimizer_are_reported_once(rate: Callable[[int], float]) -> None:
    (message,) = train(rate)
    assert "6.0e-04" in message
    assert "Leave out `lr`" in message


@pytest.mark.parametrize(
    "rate", [lambda _: 0.1, lambda step: step / 100, lambda s: 0.1 / (s + 1) ** 3]
)
def test_warm_ups_and_decays_are_not_reported(rate: Callable[[int], float]) -> None:
    assert not train(rate)
