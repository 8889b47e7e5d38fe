"""Columns of an output in which a loss has slope and no curvature take the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature
from torch import Tensor
from torch.func import grad as gradient_of
from torch.func import hessian
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
POSITIONS = torch.randn(5, 3, 4, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(5) % 2

PARTLY: dict[str, tuple[Tensor, Loss, Loss, tuple[slice, ...], Tensor]] = {
    "columns": (
        X,
        lambda o: functional.mse_loss(o[:, :2], T[:, :2]) - functional.softplus(o[:, 2:]).mean(),
        lambda o: functional.mse_loss(o[:, :2], T[:, :2]),
        (slice(None), slice(2, None)),
        torch.ones(()),
    ),
    "positions": (
        POSITIONS,
        lambda o: functional.cross_entropy(o[:, 0], Y) + (o[:, 1] * T).mean(),
        lambda o: functional.cross_entropy(o[:, 0], Y),
        (slice(None), slice(1, 2)),
        T.abs().mean(),
    ),
}
"""Outputs, a loss, its part with curvature, where it has none, and a number it is linear in."""
WHOLLY: dict[str, Loss] = {
    "smooth, in part": lambda o: functional.smooth_l1_loss(o, T),
    "smooth, far off": lambda o: (
        functional.cross_entropy(o[:, :2], Y) + functional.smooth_l1_loss(o[:, 2:], 9 + T[:, 2:])
    ),
    "smooth, far off alone": lambda o: functional.huber_loss(o, 9 + T),
    "without slope": lambda o: functional.cross_entropy(o[:, :2], Y),
    "differences": lambda o: (o - o.mean(1, keepdim=True)).square().mean(),
    "cross entropy of sums": lambda o: functional.cross_entropy(o.unflatten(1, (2, 2)).sum(1), Y),
}
"""Losses whose Hessian is all of their curvature."""


def matrix(loss: Loss, x: Tensor) -> Tensor:
    return hessian(loss)(x).reshape(x.numel(), x.numel())


@pytest.mark.parametrize("name", PARTLY)
def test_columns_without_curvature(name: str) -> None:
    x, loss, curved, part, unit = PARTLY[name]
    slope = torch.zeros_like(x)
    slope[part] = gradient_of(loss)(x)[part]
    examples = torch.eye(len(x), dtype=x.dtype)[:, :, None] * slope.flatten(1)[:, None]
    own = examples.reshape(len(x), -1)  # a row for each example
    expected = matrix(curved, x) + len(x) * own.T @ own / unit
    torch.testing.assert_close(loss_curvature(loss, x), expected)


@pytest.mark.parametrize("name", WHOLLY)
def test_columns_with_curvature_keep_it(name: str) -> None:
    torch.testing.assert_close(loss_curvature(WHOLLY[name], X), matrix(WHOLLY[name], X))
