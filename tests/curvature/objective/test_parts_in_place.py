"""Functions in place of a part of a tensor between output and loss, as in Barlow Twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_selections import OTHER, T, X, tail_of
from torch import Tensor
from torch.nn import functional

WEIGHTS = torch.linspace(0.5, 1.5, 16, dtype=torch.float64).reshape(8, 2)
CHANGES: dict[str, Callable[[Tensor], object]] = {
    "sigmoid": lambda c: c[:, 1:3].sigmoid_(),
    "hyperbolic tangent": lambda c: c[2].tanh_(),
    "positive part": lambda c: c[:, 1:3].relu_(),
    "leaky": lambda c: functional.leaky_relu_(c[:, 1:3], 0.1),
    "square": lambda c: c[:, 1:3].pow_(2),
    "cube of every other": lambda c: c[::2].pow_(3),
    "transposed": lambda c: c.T[1:3].sigmoid_(),
    "all, flat": lambda c: c.view(-1).sigmoid_(),
    "all, transposed": lambda c: c.T.sigmoid_(),
    "scaled": lambda c: c[:, 1:3].mul_(3).neg_(),
    "weighted": lambda c: c[:, 1:3].mul_(WEIGHTS).div_(2),
    "several": lambda c: c[:1, 1:].pow_(2).sub_(1).pow_(2),
    "assigned": lambda c: c[:, 1:3].copy_(c[:, 1:3].sigmoid()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_loss_at_other_outputs(name: str) -> None:
    def loss(o: Tensor) -> Tensor:
        c = o * 1.5
        CHANGES[name](c)
        return (c - T).square().mean()

    torch.testing.assert_close(tail_of(loss).value([OTHER]), loss(OTHER), rtol=1e-12, atol=1e-12)


def test_the_curvature_of_barlow_twins() -> None:
    """With the square of the diagonal and of the rest, as the loss is published."""

    def loss(o: Tensor) -> Tensor:
        c, n = o.T @ o / 8, o.shape[1]
        on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
        rest = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
        return on_diagonal + 0.005 * rest

    tail, along = tail_of(loss), T - 0.5
    torch.testing.assert_close(tail.value([OTHER]), loss(OTHER), rtol=1e-12, atol=1e-12)
    change = (along.T @ X + X.T @ along) / 8
    weights = torch.full((5, 5), 0.005).double().fill_diagonal_(1.0)
    found = tail.expansion([[along]]).curvature[0, 0]
    torch.testing.assert_close(found, (2 * weights * change.square()).sum())


@pytest.mark.parametrize("change", ["exp_", "sin_", "abs_"])
def test_others_are_unknown(change: str) -> None:
    def loss(o: Tensor) -> Tensor:
        c = o * 1.5
        getattr(c[:, 1:3], change)()
        return (c - T).square().mean()

    with pytest.raises(AssertionError, match="CopySlices"):
        tail_of(loss)
