"""Policy gradients: cross entropies with weights of both signs, by the magnitudes of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.distributions import Categorical
from torch.func import hessian
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(4, (5,), generator=GENERATOR)
REWARDS = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7], dtype=torch.float64)
OLD = X.log_softmax(1).gather(1, Y[:, None])[:, 0]
BOUND = 0.2
"""Change of probabilities up to which the clipped loss has a slope; none has changed yet."""


def ratio(o: Tensor) -> Tensor:
    return (o.log_softmax(1).gather(1, Y[:, None])[:, 0] - OLD).exp()


def clipped(o: Tensor) -> Tensor:
    kept = ratio(o).clamp(1 - BOUND, 1 + BOUND)
    return -torch.minimum(ratio(o) * REWARDS, kept * REWARDS).mean()


POLICIES: dict[str, Loss] = {
    "cross entropies": lambda o: (
        functional.cross_entropy(o, Y, reduction="none") * REWARDS
    ).mean(),
    "log-probabilities": lambda o: -(o.log_softmax(1).gather(1, Y[:, None])[:, 0] * REWARDS).mean(),
    "a distribution": lambda o: -(Categorical(logits=o).log_prob(Y) * REWARDS).mean(),
    "ratios": lambda o: -(ratio(o) * REWARDS).mean(),
    "clipped ratios": clipped,
}


def by_magnitudes(x: Tensor) -> Tensor:
    """Return the Hessian of the cross entropies with the magnitudes of their weights."""

    def loss(o: Tensor) -> Tensor:
        own = functional.cross_entropy(o, Y, reduction="none")
        return (own * REWARDS.abs()).mean()

    return hessian(loss)(x).reshape(x.numel(), x.numel())


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str) -> None:
    torch.testing.assert_close(loss_curvature(POLICIES[name], X), by_magnitudes(X))


def test_a_model_that_ends_with_log_probabilities() -> None:
    def loss(o: Tensor) -> Tensor:
        return -(o.gather(1, Y[:, None])[:, 0] * REWARDS).mean()

    own = loss_curvature(loss, X, lambda x: (x * 1.0).log_softmax(1))
    torch.testing.assert_close(own, by_magnitudes(X))


def test_a_policy_beside_a_value() -> None:
    x = torch.cat([X, X[:, :1]], 1)

    def value(o: Tensor) -> Tensor:
        return functional.mse_loss(o[:, 4], REWARDS)

    expected = hessian(value)(x)
    expected[:, :4, :, :4] += by_magnitudes(X).reshape(5, 4, 5, 4)
    own = loss_curvature(lambda o: POLICIES["clipped ratios"](o[:, :4]) + value(o), x)
    torch.testing.assert_close(own, expected.reshape(25, 25))


def test_an_entropy_whose_hessian_is_known_keeps_it() -> None:
    def entropy(o: Tensor) -> Tensor:
        return (o.softmax(1) * o.log_softmax(1)).sum(1).mean()

    convex = hessian(entropy)(0.1 * X).reshape(20, 20)
    torch.testing.assert_close(loss_curvature(entropy, 0.1 * X), convex)
