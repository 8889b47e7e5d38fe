"""How far new outputs of a model move the distributions of a policy gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature, read_loss
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    Normal,
    kl_divergence,
)
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
NEW = X + torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(4, (5,), generator=GENERATOR)
ACTIONS = torch.rand(5, 2, generator=GENERATOR, dtype=torch.float64)
REWARDS = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7], dtype=torch.float64)


def log_p(o: Tensor) -> Tensor:
    return o.log_softmax(1).gather(1, Y[:, None])[:, 0]


def clipped(ratio: Tensor) -> Tensor:
    return -torch.minimum(ratio * REWARDS, ratio.clamp(0.8, 1.2) * REWARDS).mean()


CLASSES: dict[str, Loss] = {
    "cross entropies": lambda o: (
        functional.cross_entropy(o, Y, reduction="none") * REWARDS
    ).mean(),
    "log-probabilities": lambda o: -(log_p(o) * REWARDS).mean(),
    "temperature": lambda o: -(log_p(o) * REWARDS).mean(),
    "ratios": lambda o: clipped((log_p(o) - log_p(X)).exp()),
    "an entropy": lambda o: (
        -(Categorical(logits=o).log_prob(Y) * REWARDS).mean()
        - 0.01 * Categorical(logits=o).entropy().mean()
    ),
}


def divergence(loss: Loss, new: Tensor = NEW, last: Loss | None = None) -> Tensor:
    """Return the mean divergence that the reading of a loss gives."""
    total, count = read_loss(loss, X, last).divergence([new]).tolist()
    return torch.tensor(total / count, dtype=torch.float64)


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name: str) -> None:
    pair = [Categorical(logits=o) for o in (X, NEW)]
    torch.testing.assert_close(divergence(CLASSES[name]), kl_divergence(*pair).mean())


def test_scores_that_are_clipped_smoothly() -> None:
    pair = [Categorical(logits=10 * (o / 10).tanh()) for o in (X, NEW)]
    found = divergence(lambda o: CLASSES["log-probabilities"](10 * (o / 10).tanh()))
    torch.testing.assert_close(found, kl_divergence(*pair).mean())


def test_a_model_that_ends_with_log_probabilities() -> None:
    def loss(o: Tensor) -> Tensor:
        return -(o.gather(1, Y[:, None])[:, 0] * REWARDS).mean()

    found = divergence(loss, NEW.log_softmax(1), lambda x: (x * 1.0).log_softmax(1))
    pair = [Categorical(logits=o) for o in (X, NEW)]
    torch.testing.assert_close(found, kl_divergence(*pair).mean())


def test_examples_without_weight_do_not_count() -> None:
    weights = REWARDS.where(torch.arange(5) != 1, 0.0)
    pair = [Categorical(logits=o) for o in (X, NEW)]
    found = divergence(lambda o: -(log_p(o) * weights).mean())
    torch.testing.assert_close(found, kl_divergence(*pair)[weights != 0].mean())


DENSITIES: dict[str, Callable[[Tensor], Distribution]] = {
    "normal, one scale": lambda o: Independent(Normal(o[:, :2], 0.5), 1),
    "normal": lambda o: Independent(Normal(o[:, :2], o[:, 2:].exp()), 1),
    "beta": lambda o: Independent(
        Beta(functional.softplus(o[:, :2]) + 1, functional.softplus(o[:, 2:]) + 1), 1
    ),
    "classes by probabilities": lambda o: Categorical(o.softmax(1)),
}


@pytest.mark.parametrize("has_entropy", [False, True], ids=["alone", "with an entropy"])
def test_bernoulli(has_entropy: bool) -> None:
    def loss(o: Tensor) -> Tensor:
        own = Bernoulli(logits=o)
        bonus = 0.01 * own.entropy().mean() if has_entropy else 0.0
        return -(own.log_prob(ACTIONS.round().repeat(1, 2)).sum(1) * REWARDS).mean() - bonus

    pair = [Bernoulli(logits=o) for o in (X, NEW)]
    torch.testing.assert_close(divergence(loss), kl_divergence(*pair).mean())
    p = X.sigmoid()
    own = REWARDS.abs()[:, None] * p * (1 - p) / 5
    torch.testing.assert_close(loss_curvature(loss, X), own.flatten().diag())


@pytest.mark.parametrize("name", DENSITIES)
def test_the_information_of_samples(name: str) -> None:
    def log_density(o: Tensor) -> Tensor:
        actions = Y if name.startswith("classes") else ACTIONS
        return DENSITIES[name](o).log_prob(actions)

    slopes = jacobian(log_density, X).reshape(5, 20)
    expected = torch.einsum("n,ni,nj->ij", REWARDS.abs() / 5, slopes, slopes)
    found = loss_curvature(lambda o: -(log_density(o) * REWARDS).mean(), X)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_ratio", [False, True], ids=["logarithms", "ratios"])
@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name: str, is_ratio: bool) -> None:
    def log_density(o: Tensor) -> Tensor:
        actions = Y if name.startswith("classes") else ACTIONS
        return DENSITIES[name](o).log_prob(actions)

    def loss(o: Tensor) -> Tensor:
        if is_ratio:
            return clipped((log_density(o) - log_density(X)).exp())
        return -(log_density(o) * REWARDS).mean()

    change = log_density(NEW) - log_density(X)
    torch.testing.assert_close(divergence(loss), (change.exp() - 1 - change).mean())


def test_the_divergence_of_densities_is_that_of_its_samples() -> None:
    old, new = (Normal(o[:, 0], o[:, 2].exp()) for o in (0.3 * X, 0.3 * X + 0.1))
    samples = old.sample((20000,))
    change = new.log_prob(samples) - old.log_prob(samples)
    found = (change.exp() - 1 - change).mean()
    torch.testing.assert_close(found, kl_divergence(old, new).mean(), rtol=0.05, atol=0.0)


SUPERVISED: dict[str, Loss] = {
    "a cross entropy": lambda o: functional.cross_entropy(o, Y),
    "rewards of one sign": lambda o: -(log_p(o) * REWARDS.abs()).mean(),
    "squares": lambda o: (o - NEW).square().mean(),
    "absolute differences": lambda o: (o - NEW).abs().mean(),
    "quantiles": lambda o: torch.maximum(0.9 * (NEW - o), -0.1 * (NEW - o)).mean(),
    "a mixture": lambda o: (
        -torch.logsumexp(
            o[:, :2].log_softmax(1) + Normal(o[:, 2:], 1.0).log_prob(REWARDS[:, None]), 1
        ).mean()
    ),
    "a critic": lambda o: (o[:, 0] * REWARDS).mean(),
    "cosines": lambda o: (functional.cosine_similarity(o, NEW) * REWARDS).mean(),
    "values": lambda o: functional.smooth_l1_loss(o[:, 0], REWARDS),
    "a Gaussian code": lambda o: -0.5 * (1 + o[:, 2:] - o[:, :2].square() - o[:, 2:].exp()).sum(),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_other_losses_have_no_policy(name: str) -> None:
    assert not read_loss(SUPERVISED[name], X).has_policies


@pytest.mark.parametrize("is_ratio", [False, True], ids=["logarithms", "ratios"])
def test_a_model_that_returns_logarithms_of_densities(is_ratio: bool) -> None:
    def log_density(x: Tensor) -> Tensor:
        return DENSITIES["normal"](x).log_prob(ACTIONS)

    def loss(o: Tensor) -> Tensor:
        return clipped((o - log_density(X)).exp()) if is_ratio else -(o * REWARDS).mean()

    change = log_density(NEW) - log_density(X)
    found = divergence(loss, log_density(NEW), log_density)
    torch.testing.assert_close(found, (change.exp() - 1 - change).mean())


def test_a_classifier_that_ends_with_log_probabilities_has_no_policy() -> None:
    tail = read_loss(lambda o: functional.nll_loss(o, Y), X, lambda x: (x * 1.0).log_softmax(1))
    assert not tail.has_policies
