"""Losses whose scales are outputs of the model: variances, and divergences from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.distributions import Laplace, LogNormal, Normal, kl_divergence
from torch.func import hessian, jacrev
from torch.nn import functional

from einconv_kfac.curvature.objective.nodes.bilinear import Quotient

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)
ZEROS, ONES = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


def halves(o: Tensor) -> tuple[Tensor, Tensor]:
    return o[:, :3], o[:, 3:]


def whole(loss: Loss, x: Tensor = X) -> Tensor:
    return hessian(loss)(x).reshape(x.numel(), x.numel())


def by_halves(loss: Loss) -> Tensor:
    """Return the Hessian without what means and scales share, whose expectation is zero."""
    is_mean = torch.arange(6).expand(5, 6).flatten() < 3
    return whole(loss).where(is_mean[:, None] == is_mean, 0)


def likelihood(o: Tensor, scale: Callable[[Tensor], Tensor], y: Tensor = Y) -> Tensor:
    mean, other = halves(o)
    return functional.gaussian_nll_loss(mean, y, scale(other).square())


EXPONENTIAL: dict[str, Loss] = {
    "gaussian_nll_loss": lambda o: functional.gaussian_nll_loss(o[:, :3], Y, o[:, 3:].exp()),
    "Normal": lambda o: -Normal(o[:, :3], (o[:, 3:] / 2).exp()).log_prob(Y).mean(),
    "by hand": lambda o: ((o[:, :3] - Y) ** 2 / o[:, 3:].exp() + o[:, 3:]).mean() / 2,
    "product": lambda o: ((o[:, :3] - Y) ** 2 * (-o[:, 3:]).exp() + o[:, 3:]).mean() / 2,
}
"""Likelihoods of normal distributions by the logarithms of their variances."""


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_logarithms_of_variances_have_the_hessian(name: str) -> None:
    loss = EXPONENTIAL[name]
    torch.testing.assert_close(loss_curvature(loss, X), by_halves(loss))


@pytest.mark.parametrize("scale", [functional.softplus, torch.exp, lambda s: s.sigmoid() + 0.1])
def test_the_expectation_is_the_fisher_information(scale: Callable[[Tensor], Tensor]) -> None:
    mean, other = halves(X)
    signs = (-1.0) ** torch.arange(15).reshape(5, 3)
    target = mean + signs * scale(other)  # where squares are their expectations

    def parameters(o: Tensor) -> Tensor:
        return torch.stack([halves(o)[0], scale(halves(o)[1])])

    by_output = jacrev(parameters)(X).reshape(2, 15, 30)
    weights = torch.stack([scale(other) ** -2, 2 * scale(other) ** -2]).reshape(2, 15) / 15
    expected = torch.einsum("kij,ki,kil->jl", by_output, weights, by_output)
    found = loss_curvature(lambda o: likelihood(o, scale, target), X)
    torch.testing.assert_close(found, expected)


DIVERGENCES: dict[str, Loss] = {
    "half of a logarithm": lambda o: kl_divergence(
        Normal(o[:, :3], (o[:, 3:] / 2).exp()), Normal(0.0, 1.0)
    ),
    "tensors": lambda o: kl_divergence(Normal(o[:, :3], o[:, 3:].exp()), Normal(ZEROS, ONES)),
    "another scale": lambda o: kl_divergence(
        Normal(o[:, :3], (o[:, 3:] / 2).exp()), Normal(0.5, 2.0)
    ),
    "softplus": lambda o: kl_divergence(
        Normal(o[:, :3], functional.softplus(o[:, 3:])), Normal(0.0, 1.0)
    ),
    "by hand": lambda o: (
        (v := (o[:, 3:] / 2).exp().square()) + o[:, :3].square() - 1 - (2 * v).log()
    ),
    "of logarithms": lambda o: kl_divergence(
        LogNormal(o[:, :3], o[:, 3:].exp()), LogNormal(0.0, 1.0)
    ),
}
"""Divergences from a prior, whose Hessian is positive semi-definite."""


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_have_their_hessian(name: str) -> None:
    def loss(o: Tensor) -> Tensor:
        return DIVERGENCES[name](o).sum(1).mean()

    torch.testing.assert_close(loss_curvature(loss, X), whole(loss))


@pytest.mark.parametrize(
    ("a", "b", "weight"),
    [
        ([1.0, 2.0], [1.0, 0.0], [1.0, 1.0]),
        ([1.0, -2.0], [1.0, 3.0], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 3.0], [1.0, -1.0]),
    ],
)
def test_quotients_without_curvature(a: list[float], b: list[float], weight: list[float]) -> None:
    rule = Quotient("Div", torch.div, ("self", "other"), (frozenset({0}),))
    quotient = torch.tensor(a, requires_grad=True) / torch.tensor(b, requires_grad=True)
    assert rule.by_scale(quotient.grad_fn, torch.tensor(weight)) is None


ABSOLUTE: dict[str, Loss] = {
    "Laplace": lambda o: -Laplace(o[:, :3], functional.softplus(o[:, 3:])).log_prob(Y).mean(),
    "by hand": lambda o: (
        (o[:, :3] - Y).abs() / (b := functional.softplus(o[:, 3:])) + b.log()
    ).mean(),
}
"""Likelihoods of Laplace distributions."""


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_differences_have_the_fisher_information(name: str) -> None:
    mean, other = halves(X)
    scale, slope = functional.softplus(other), other.sigmoid()
    by_scale = slope.square() * (mean - Y).abs() / scale**3  # whose expectation is 1 / scale^2
    expected = torch.cat([scale**-2, by_scale], 1).flatten().diag() / 15
    torch.testing.assert_close(loss_curvature(ABSOLUTE[name], X), expected)


def test_relative_errors_have_no_scales() -> None:
    def losses(o: Tensor) -> Tensor:
        return (o[:, :3] - Y).abs() / (o[:, :3].abs() + Y.abs())

    slopes, values = jacrev(lambda o: losses(o).flatten())(X).flatten(1), losses(X)
    found = loss_curvature(lambda o: losses(o).mean(), X)
    torch.testing.assert_close(found, slopes.mT @ slopes / values.sum())
