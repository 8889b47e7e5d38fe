"""Losses without curvature as densities ``exp(-l / s)``, against this matrix by its definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.distributions import Laplace
from torch.func import hessian, jacrev
from torch.nn import functional

Losses = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
SIGNS = T.sign()
W = torch.rand(6, 4, generator=GENERATOR, dtype=torch.float64)
MEAN = torch.full((6, 4), 1 / 24, dtype=torch.float64)

LOSSES: dict[str, tuple[Losses, Tensor]] = {
    "absolute": (lambda o: (o - T).abs(), MEAN),
    "absolute, by torch": (lambda o: functional.l1_loss(o, T, reduction="none"), MEAN),
    "weighted": (lambda o: (o - T).abs(), W),
    "hinge": (lambda o: (1 - SIGNS * o).clamp(min=0), MEAN),
    "least": (lambda o: (1 - SIGNS * o).clamp_min(0), W),
    "quantile": (lambda o: torch.maximum(0.9 * (T - o), -0.1 * (T - o)), MEAN),
    "positive part": (lambda o: torch.relu(1 - SIGNS * o), MEAN),
    "ranking": (
        lambda o: functional.margin_ranking_loss(
            o[:, :2], o[:, 2:], SIGNS[:, :2], margin=0.5, reduction="none"
        ),
        torch.full((6, 2), 1 / 12, dtype=torch.float64),
    ),
    "of probabilities": (lambda o: (o.softmax(1) - T.softmax(1)).abs(), MEAN),
}
"""Losses, and their weights in the sum."""


def information(losses: Losses, weight: Tensor, x: Tensor) -> Tensor:
    """Return ``J^T diag(w / s) J`` for the mean ``s`` of the losses."""
    jacobian = jacrev(losses)(x).reshape(weight.numel(), x.numel())
    mean = (losses(x) * weight).sum() / weight.sum()
    return jacobian.T @ (weight.flatten()[:, None] / mean * jacobian)


def total(losses: Losses, weight: Tensor, x: Tensor) -> Tensor:
    return (losses(x) * weight).sum()


def matrix(loss: Losses, x: Tensor) -> Tensor:
    return hessian(loss)(x).reshape(x.numel(), x.numel())


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_that_of_densities_and_linear_in_the_loss(name: str, factor: float) -> None:
    expected = factor * information(*LOSSES[name], X)
    torch.testing.assert_close(
        loss_curvature(lambda o: factor * total(*LOSSES[name], o), X), expected
    )


def test_absolute_differences_have_the_fisher_information_of_a_laplace_distribution() -> None:
    # of the likeliest scale s, whose negative logarithm is the loss divided by s, and a constant
    scale = (X - T).abs().mean()

    def logarithm(location: Tensor, y: Tensor) -> Tensor:
        return Laplace(location, scale, validate_args=False).log_prob(y)

    draws = Laplace(torch.zeros(100, dtype=torch.float64), scale).icdf(
        (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    )
    fisher = jacrev(logarithm)(torch.zeros((), dtype=torch.float64), draws).square().mean()
    expected = torch.eye(24, dtype=torch.float64) * fisher * scale / 24
    torch.testing.assert_close(loss_curvature(partial(functional.l1_loss, target=T), X), expected)


def test_columns_beside_curved_ones() -> None:
    def curved(o: Tensor) -> Tensor:
        return functional.mse_loss(o[:, :1], T[:, :1])

    def flat(o: Tensor) -> Tensor:
        return functional.l1_loss(o[:, 1:], T[:, 1:], reduction="none")

    weight = torch.full((6, 3), 1 / 18, dtype=torch.float64)
    expected = matrix(curved, X) + information(flat, weight, X)
    torch.testing.assert_close(loss_curvature(lambda o: curved(o) + flat(o).mean(), X), expected)


def test_entries_that_depend_on_curved_columns_are_left_out() -> None:
    def curved(o: Tensor) -> Tensor:
        return functional.mse_loss(o[:, :1], T[:, :1])

    def flat(o: Tensor) -> Tensor:  # the last entries depend on the first column
        return torch.cat([o[:, 1:], o[:, :1] + o[:, 1:2]], 1).abs()

    kept = torch.cat([torch.ones(6, 3), torch.zeros(6, 1)], 1).double() / 24
    jacobian = jacrev(flat)(X).reshape(24, 24)
    own = jacobian.T @ (kept.flatten()[:, None] / flat(X).mean() * jacobian)
    expected = 9 * matrix(curved, X) + own
    torch.testing.assert_close(
        loss_curvature(lambda o: 9 * curved(o) + flat(o).mean(), X), expected
    )


@pytest.mark.parametrize("part", [0.1, 30.0])
def test_they_count_beside_a_curved_loss_if_they_are_most_of_it(part: float) -> None:
    def curved(o: Tensor) -> Tensor:
        return functional.mse_loss(o, T)

    expected = matrix(curved, X)
    if part > 1:
        expected += part * information(*LOSSES["absolute"], X)
    loss = lambda o: curved(o) + part * functional.l1_loss(o, T)  # noqa: E731
    torch.testing.assert_close(loss_curvature(loss, X), expected)
