"""Norms that are losses have the curvature of the sums that they are written for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.func import hessian
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)

ABSOLUTE: dict[str, tuple[Loss, float]] = {
    "sum": (lambda o: torch.norm(o - T, p=1), 1.0),
    "mean": (lambda o: torch.linalg.vector_norm(o - T, 1) / 30, 1 / 30),
    "rows": (lambda o: (o - T).norm(1, dim=1).mean(), 1 / 5),
    "kept": (lambda o: torch.norm(o - T, 1, 1, keepdim=True).sum(), 1.0),
    "pairs": (lambda o: functional.pairwise_distance(o, T, p=1, eps=0).mean(), 1 / 5),
}
"""Norms of order one, and the weight of an entry."""


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_entries_have_the_information_of_their_densities(name: str) -> None:
    loss, weight = ABSOLUTE[name]
    expected = torch.eye(30, dtype=torch.float64) * weight / (X - T).abs().mean()
    torch.testing.assert_close(loss_curvature(loss, X), expected)


WHOLE: dict[str, Loss] = {
    "norm": lambda o: torch.norm(o - T),
    "vector_norm": lambda o: torch.linalg.vector_norm(o - T),
    "matrix norm": lambda o: torch.linalg.norm(o - T),
    "dist": lambda o: torch.dist(o, T),
    "by hand": lambda o: (o - T).square().sum().sqrt(),
    "mean": lambda o: functional.mse_loss(o, T).sqrt() * 30**0.5,
}


@pytest.mark.parametrize("name", WHOLE)
def test_roots_of_all_squares_have_the_curvature_of_squares(name: str) -> None:
    expected = torch.eye(30, dtype=torch.float64) / (X - T).norm()
    torch.testing.assert_close(loss_curvature(WHOLE[name], X), expected)


def test_a_norm_without_a_length_has_no_such_curvature() -> None:
    found = loss_curvature(lambda o: torch.norm(o - X), X)
    assert bool(found.isfinite().all())


def huber(o: Tensor) -> Tensor:
    """The loss of Huber in two pieces."""
    error = (o - T).abs()
    return torch.where(error < 1, error.square() / 2, error - 0.5).mean()


def clipped(o: Tensor) -> Tensor:
    """The same by the part of the error that is squared."""
    error = (o - T).abs()
    squared = error.clamp(max=1)
    return (squared.square() / 2 + (error - squared)).mean()


@pytest.mark.parametrize("loss", [huber, clipped, functional.huber_loss])
def test_losses_of_huber_have_their_hessian(loss: Callable[..., Tensor]) -> None:
    given = (T,) if loss is functional.huber_loss else ()
    expected = hessian(lambda o: functional.huber_loss(o, T))(X).reshape(30, 30)
    torch.testing.assert_close(loss_curvature(lambda o: loss(o, *given), X), expected)


def test_logarithms_of_softplus_have_the_hessian() -> None:
    counts = T.abs().round()

    def loss(o: Tensor) -> Tensor:
        rate = functional.softplus(o)
        return (rate - counts * rate.log()).mean()

    torch.testing.assert_close(loss_curvature(loss, X), hessian(loss)(X).reshape(30, 30))


LENGTHS: dict[str, Loss] = {
    "norm": lambda o: o.view(5, 3, 2).norm(dim=-1).mean(),
    "by hand": lambda o: o.view(5, 3, 2).square().sum(-1).sqrt().mean(),
    "products": lambda o: ((z := o.view(5, 3, 2)) * z).sum(-1).sqrt().mean(),
    "clamped": lambda o: o.view(5, 3, 2).pow(2).sum(-1).clamp(min=1e-8).sqrt().mean(),
    "complex": lambda o: torch.view_as_complex(o.view(5, 3, 2)).abs().mean(),
    "deviations": lambda o: (o.var(0) + 1e-4).sqrt().mean(),
}
"""Lengths of vectors, which are convex."""


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_that_should_grow_have_no_curvature(name: str) -> None:
    found = loss_curvature(lambda o: functional.mse_loss(o, T) - 3 * LENGTHS[name](o), X)
    expected = hessian(lambda o: functional.mse_loss(o, T))(X).reshape(30, 30)
    torch.testing.assert_close(found, expected)


def test_roots_of_others_that_should_grow_are_convex() -> None:
    def loss(o: Tensor) -> Tensor:
        return functional.mse_loss(o, T) - (1 + o.exp()).sqrt().mean()

    squares = hessian(lambda o: functional.mse_loss(o, T))(X).reshape(30, 30)
    found = loss_curvature(loss, X) - squares
    slopes = X.exp().square() / (4 * (1 + X.exp()) ** 1.5) / 30  # of the root alone
    torch.testing.assert_close(found, slopes.flatten().diag())
