"""Variances have their Hessian, standard deviations that of the squares below the root."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature, read_loss
from torch import Tensor
from torch.func import hessian
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, 4, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(5, 3, 4, generator=GENERATOR, dtype=torch.float64)

VARIANCES: dict[str, Loss] = {
    "all": lambda o: o.var(),
    "all, biased": lambda o: o.var(unbiased=False),
    "batch": lambda o: (o.var(0) * T[0].abs()).sum(),
    "two dimensions": lambda o: torch.var(o, (0, -1), correction=0, keepdim=True).sum(),
    "rows": lambda o: o.var(-1, keepdim=True).mean(),
    "beside a square": lambda o: (o - T).var() + 0.15 * (o - T).mean().square(),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_variances_have_their_hessian(name: str) -> None:
    expected = hessian(VARIANCES[name])(X).reshape(60, 60)
    torch.testing.assert_close(loss_curvature(VARIANCES[name], X), expected)


DEVIATIONS: dict[str, tuple[Loss, Loss]] = {
    "all": (lambda o: o.std(), lambda o: ((o - o.mean()).square().sum() / 59).sqrt()),
    "batch": (
        lambda o: (o.std(0) * T[0].abs()).sum(),
        lambda o: (((o - o.mean(0)).square().sum(0) / 4).sqrt() * T[0].abs()).sum(),
    ),
    "root": (
        lambda o: (o - T).var((0, 1)).sqrt().sum(),
        lambda o: (
            (((d := o - T) - d.mean((0, 1), keepdim=True)).square().sum((0, 1)) / 14).sqrt().sum()
        ),
    ),
}
"""Standard deviations, and the same by hand."""


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_have_the_curvature_of_their_squares(name: str) -> None:
    loss, by_hand = DEVIATIONS[name]
    torch.testing.assert_close(loss(X), by_hand(X))
    torch.testing.assert_close(loss_curvature(loss, X), loss_curvature(by_hand, X))


def test_deviations_of_rows_have_their_hessian() -> None:
    def loss(o: Tensor) -> Tensor:
        return o.std(-1).mean()

    torch.testing.assert_close(loss_curvature(loss, X), hessian(loss)(X).reshape(60, 60))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: functional.mse_loss(o, T) - 0.1 * o.var(0).mean(),
        lambda o: functional.relu(1 - o.std(0)).mean() + functional.mse_loss(o, T),
    ],
    ids=["negative", "hinge"],
)
def test_others_have_no_such_curvature(loss: Loss) -> None:
    names = {term.name for term in read_loss(loss, X).terms()}
    assert names.isdisjoint({"Var", "Std"})


def test_entries_without_spread_have_none() -> None:
    x = torch.ones(5, 2, dtype=torch.float64) * torch.tensor([0.0, 1.0], dtype=torch.float64)
    x[:, 1] += torch.arange(5)
    found = loss_curvature(lambda o: o.std(0).sum(), x)
    assert bool(found.isfinite().all())
    assert bool((found[0::2, 0::2] == 0).all())
