"""Steps that change a policy by much."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.optim.step import policy_bound
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER
from einconv_kfac.optim.step.policy_bound import LARGEST_DIVERGENCE

Loss = Callable[[Tensor], Tensor]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0, 2, 0, 3])
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -2.0], dtype=torch.float64)


def policy_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def normal(o: Tensor) -> Distribution:
    return Independent(Normal(o[:, :2], (o[:, 2:] - 1).exp()), 1)


def policy_gradient(rewards: Tensor, policy: Callable[[Tensor], Distribution]) -> Loss:
    """Return a loss of outputs, with samples of the policy of the first ones that it is given."""
    samples: list[Tensor] = []

    def loss(o: Tensor) -> Tensor:
        if not samples:
            samples.append(policy(o.detach()).sample())
        return -(policy(o).log_prob(samples[0]) * rewards).mean()

    return loss


def step(opt: KFAC, model: nn.Module, loss: Loss) -> tuple[Tensor, Tensor]:
    """Take a step, and return the outputs before and after it."""
    opt.zero_grad()
    output = model(X)
    opt.observe(loss(output)).backward()
    opt.step()
    return output.detach(), model(X).detach()


def rewarded(o: Tensor) -> Tensor:
    return (functional.cross_entropy(o, Y, reduction="none") * SIGNS).mean()


def largest_divergence(steps: int = 6) -> float:
    """Return the largest divergence of a policy after one of the first steps."""
    model = policy_model()
    opt, found = KFAC(model), 0.0
    for _ in range(steps):
        before, after = step(opt, model, rewarded)
        pair = Categorical(logits=before), Categorical(logits=after)
        found = max(found, float(kl_divergence(*pair).mean()))
    return found


def test_classes() -> None:
    assert largest_divergence() <= LARGEST_DIVERGENCE * (1 + 1e-9)


def test_the_steps_would_change_the_policy_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_bound, "LARGEST_DIVERGENCE", torch.inf)
    assert largest_divergence() > 2 * LARGEST_DIVERGENCE


def test_densities() -> None:
    model = policy_model()
    opt, largest = KFAC(model), 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        loss = policy_gradient(SIGNS, normal)
        before, after = step(opt, model, loss)
        torch.manual_seed(seed)
        actions = normal(before).sample()
        change = normal(after).log_prob(actions) - normal(before).log_prob(actions)
        found = float((change.exp() - 1 - change).mean())
        largest = max(largest, found)
    assert LARGEST_DIVERGENCE / 2 < largest <= LARGEST_DIVERGENCE * (1 + 1e-9)


def test_the_momentum_is_shortened_as_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Tensor, Tensor]] = []
    for bound in (torch.inf, 1e-4):
        monkeypatch.setattr(policy_bound, "LARGEST_DIVERGENCE", bound)
        model = policy_model()
        opt, weight = KFAC(model), model[2].weight
        before = weight.detach().clone()
        step(opt, model, rewarded)
        taken.append((weight.detach() - before, opt.state[weight][BUFFER]))
    (free, free_slow), (bounded, slow) = taken
    ratio = bounded.norm() / free.norm()
    assert ratio < 0.5
    torch.testing.assert_close(bounded, ratio * free)
    torch.testing.assert_close(slow, ratio * free_slow)


def test_supervised_steps_are_not_evaluated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_bound, "LARGEST_DIVERGENCE", 0.0)  # would take every step back
    model = policy_model()
    before, after = step(KFAC(model), model, lambda o: functional.cross_entropy(o, Y))
    assert not torch.equal(before, after)


def normal_with_entropy(o: Tensor, rows: slice | int) -> Tensor:
    policy = Normal(o[..., 0], (o[..., 1] - 1).exp())
    value = 0.5 * (o[..., 2] - SIGNS[rows]).square()
    return -policy.log_prob(X[rows, 0]) * SIGNS[rows] + value - 0.01 * policy.entropy()


EPISODES: dict[str, Callable[[Tensor, slice | int], Tensor]] = {
    "scores": lambda o, rows: -Categorical(logits=o).log_prob(Y[rows]) * SIGNS[rows],
    "softmax": lambda o, rows: -Categorical(probs=o.softmax(-1)).log_prob(Y[rows]) * SIGNS[rows],
    "probabilities": lambda o, rows: -Categorical(probs=o).log_prob(Y[rows]) * SIGNS[rows],
    "normal distribution": normal_with_entropy,
}


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("kind", EPISODES)
def test_samples_of_an_episode_are_one_policy(kind: str, *, unbatched: bool) -> None:
    """A loop that appends the loss of each sample to a list takes the steps of a batch."""

    def losses(o: Tensor, rows: slice | int) -> Tensor:
        return EPISODES[kind](o, rows)

    def episode(model: nn.Module) -> Tensor:
        if unbatched:
            return torch.as_tensor(sum(losses(model(X[i]), i) for i in range(len(X))))
        return torch.cat(
            [losses(model(X[i : i + 1]), slice(i, i + 1)) for i in range(len(X))]
        ).sum()

    found = []
    for loss in (episode, lambda model: losses(model(X), slice(None)).sum()):
        model = policy_model()
        if kind == "probabilities":
            model.append(nn.Softmax(-1))
        opt = KFAC(model, fisher="exact")
        for _ in range(2):
            opt.zero_grad()
            opt.observe(loss(model)).backward()
            opt.step()
        found.append(model(X).detach())
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
