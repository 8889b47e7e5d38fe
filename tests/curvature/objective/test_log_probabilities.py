"""Logarithms of a softmax have the curvature of cross entropy, for any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

Loss = Callable[[Tensor, Tensor], Tensor]
"""Returns a loss of probabilities and labels."""
N = 10


def one_hot(p: Tensor, y: Tensor) -> Tensor:
    return functional.one_hot(y, p.shape[1]).to(p)


def soft(p: Tensor, y: Tensor) -> Tensor:
    """Labels of two classes; all others are zero."""
    return 0.75 * one_hot(p, y) + 0.25 * one_hot(p, y).roll(1, 1)


def class_weights(p: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, p.shape[1]).to(p)


KEPT = torch.arange(N) % 3 != 0
CROSS: dict[str, tuple[Loss, Loss]] = {
    "nll_loss": (lambda p, y: functional.nll_loss(p.log(), y), functional.cross_entropy),
    "gather": (lambda p, y: -p.gather(1, y[:, None]).log().mean(), functional.cross_entropy),
    "index": (lambda p, y: -p.log()[torch.arange(N), y].mean(), functional.cross_entropy),
    "sum": (lambda p, y: -(one_hot(p, y) * p).sum(1).log().mean(), functional.cross_entropy),
    "clamp": (
        lambda p, y: -(one_hot(p, y) * p.clamp(1e-7, 1).log()).sum(1).mean(),
        functional.cross_entropy,
    ),
    "soft labels": (
        lambda p, y: -(soft(p, y) * p.log()).sum(1).mean(),
        lambda o, y: functional.cross_entropy(o, soft(o, y)),
    ),
    "weights": (
        lambda p, y: -(one_hot(p, y) * class_weights(p) * p.log()).sum(1).mean(),
        lambda o, y: functional.cross_entropy(o, y, class_weights(o), reduction="sum") / N,
    ),
    "mask": (
        lambda p, y: -(p.log()[torch.arange(N), y] * KEPT).sum() / KEPT.sum(),
        lambda o, y: (functional.cross_entropy(o, y, reduction="none") * KEPT).sum() / KEPT.sum(),
    ),
    "mask of rows": (
        lambda p, y: -p[KEPT].gather(1, y[KEPT, None]).log().sum() / N,
        lambda o, y: functional.cross_entropy(o[KEPT], y[KEPT], reduction="sum") / N,
    ),
}
EMPIRICAL: dict[str, Loss] = {
    "several classes": lambda p, y: (
        -((one_hot(p, y) + one_hot(p, y).roll(1, 1)) * p).sum(1).log().mean()
    ),
}
"""Losses with another Hessian, which is not positive semi-definite."""


def net(classes: int, *ends: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, classes), *ends).double()


def batch(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator).double()
    return x, torch.randint(classes, (N,), generator=generator)


def trained(model: nn.Module, loss: Loss, classes: int, options: dict[str, Any]) -> Tensor:
    """The weights after some steps."""
    (x, y), opt = batch(classes), KFAC(model, fisher="exact", **options)
    for _ in range(3):
        opt.zero_grad()
        opt.observe(loss(model(x), y)).backward()
        opt.step()
    return weights(model)


MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
IN_TURN = [
    (name, classes, MODES[(i + j) % 2])
    for i, name in enumerate(CROSS)
    for j, classes in enumerate((3, 70))
]
"""All losses with few and with many classes, the modes in turn."""


@pytest.mark.parametrize(("name", "classes", "options"), IN_TURN)
def test_steps_are_those_of_cross_entropy(name: str, classes: int, options: dict[str, Any]) -> None:
    """Whether the loss takes the softmax, or the model ends with it."""
    loss, same = CROSS[name]
    want = trained(net(classes), same, classes, options)
    found = trained(net(classes), lambda o, y: loss(o.softmax(1), y), classes, options)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)
    found = trained(net(classes, nn.Softmax(1)), loss, classes, options)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", EMPIRICAL)
def test_other_logarithms_keep_their_own_curvature(name: str, inside: bool) -> None:
    """The square of the logarithm's derivative, which is the empirical Fisher."""
    own, data, ends = EMPIRICAL[name], [batch(70)], [nn.Softmax(1)] if inside else []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return own(out if inside else out.softmax(1), y)

    found, want = (
        kronecker_factors(net(70, *ends), loss, data, fisher=fisher)["0"]
        for fisher in ("exact", "empirical")
    )
    torch.testing.assert_close(found.to_dense(), want.to_dense())


def test_samples_are_those_of_cross_entropy() -> None:
    """Classes are drawn from the same distributions, with the same numbers."""
    ends: list[tuple[list[nn.Module], Loss]] = [
        ([], lambda o, y: functional.nll_loss(o.softmax(1).log(), y)),
        ([nn.Softmax(1)], lambda p, y: functional.nll_loss(p.log(), y)),
        ([], functional.cross_entropy),
    ]
    first, second, want = (
        kronecker_factors(net(70, *own), loss, [batch(70)], fisher="mc", seed=3)["0"].to_dense()
        for own, loss in ends
    )
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(second, want)
