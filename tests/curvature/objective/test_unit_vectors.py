"""Losses that are linear in unit vectors have the curvature of squared distances of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature, read_loss
from torch import Tensor
from torch.func import jacrev
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64)
MAPS = torch.randn(5, 6, 2, generator=GENERATOR, dtype=torch.float64)
ONES = torch.ones(5, dtype=torch.float64)


def unit(x: Tensor, dim: int = 1) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


def gauss_newton(argument: Loss, x: Tensor, weight: Tensor) -> Tensor:
    """Return the Hessian of ``<weight, argument^2> / 2`` without second derivatives of that."""
    by_output = jacrev(argument)(x).reshape(weight.numel(), x.numel())
    return by_output.mT @ (weight.reshape(-1, 1) * by_output)


CONSTANT: dict[str, Loss] = {
    "cosine_similarity": lambda o: 1 - functional.cosine_similarity(o, T).mean(),
    "normalize": lambda o: 2 - (functional.normalize(o) * functional.normalize(T)).sum(1).mean(),
    "cosine_embedding_loss": lambda o: functional.cosine_embedding_loss(o, T, ONES),
    "norms": lambda o: -((o * T).sum(1) / (o.norm(dim=1) * T.norm(dim=1))).mean(),
    "norm by norm": lambda o: -((T * o).sum(-1) / o.norm(dim=-1) / T.norm(dim=-1)).mean(),
    "roots of squares": lambda o: (
        -(torch.sum(o * T, 1) / (o.pow(2).sum(1).sqrt() * T.pow(2).sum(1).sqrt())).mean()
    ),
    "first dimension": lambda o: 1 - functional.cosine_similarity(o.mT, T.mT, dim=0).mean(),
    "product of matrices": lambda o: -torch.trace(functional.normalize(o) @ unit(T).mT) / 5,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_cosines_with_constants(name: str) -> None:
    expected = gauss_newton(unit, X, torch.full_like(X, 1 / 5))
    torch.testing.assert_close(loss_curvature(CONSTANT[name], X), expected)


PAIRS: dict[str, Loss] = {
    "cosine_similarity": lambda o: -functional.cosine_similarity(o[:, :3], o[:, 3:]).sum(),
    "normalize": lambda o: -(functional.normalize(o[:, :3]) * functional.normalize(o[:, 3:])).sum(),
    "norms": lambda o: (
        -((o[:, :3] * o[:, 3:]).sum(1) / (o[:, :3].norm(dim=1) * o[:, 3:].norm(dim=1))).sum()
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_cosines_of_two_outputs(name: str) -> None:
    expected = gauss_newton(lambda o: unit(o[:, :3]) - unit(o[:, 3:]), X, torch.ones(5, 3).double())
    torch.testing.assert_close(loss_curvature(PAIRS[name], X), expected)


def test_weights_have_their_length() -> None:
    weights = torch.einsum("nij,j->ni", MAPS, torch.tensor([1.0, -2.0], dtype=torch.float64))
    found = loss_curvature(lambda o: (unit(o) * weights).sum(), X)
    size = weights.norm(dim=1, keepdim=True).expand_as(weights)
    torch.testing.assert_close(found, gauss_newton(unit, X, size))


def test_a_model_that_ends_with_unit_vectors() -> None:
    found = loss_curvature(lambda o: 1 - (o * unit(T)).sum(1).mean(), X, functional.normalize)
    expected = torch.eye(30, dtype=torch.float64) / 5
    torch.testing.assert_close(found, expected)


def test_the_square_is_the_cosine() -> None:
    first = loss_curvature(lambda o: (unit(o) - unit(T)).square().sum(1).mean() / 2, X)
    torch.testing.assert_close(loss_curvature(CONSTANT["normalize"], X), first)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: (o / (o.square().sum(1, keepdim=True)) * T).sum(),
        lambda o: (o / o.abs().sum(1, keepdim=True) * T).sum(),
        lambda o: functional.cosine_similarity(o[:, :3], o[:, 3:]).sum(),
        lambda o: o.exp().mean() - ((u := unit(o)) * u).sum(),
        lambda o: o.exp().mean() - ((o * o).sum(1) / (o.norm(dim=1) * o.norm(dim=1))).sum(),
        lambda o: ((o * T).sum(1) / (1 + o.square().sum(1))).sum(),
    ],
)
def test_other_quotients_are_none(loss: Loss) -> None:
    tail = read_loss(loss, X)
    assert {term.name for term in tail.terms()}.isdisjoint({"unit vectors"})
