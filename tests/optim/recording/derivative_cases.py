"""Derivatives that a script takes between model and loss, and the same inside of ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
MODES: list[dict[str, Any]] = [{"fisher": "exact"}, {"lr": 0.01, "adaptive": False}]
Returned = tuple[Tensor, ...]
Terms = Callable[[Any, Tensor], Returned]
"""Returns what a residual consists of, for a network and leaves."""


def net(inputs: int = 2, outputs: int = 1, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)
    return nn.Sequential(*layers, *last).double()


def by(value: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the derivative of a sum, with a graph."""
    weight = torch.ones_like(value) if weight is None else weight
    return torch.autograd.grad(value, x, weight, create_graph=True)[0]


class Inside(nn.Module):
    """Computes all terms in ``forward``."""

    def __init__(self, terms: Terms, build: Callable[[], nn.Module] = net) -> None:
        super().__init__()
        self.net, self.terms = build(), terms

    def forward(self, x: Tensor) -> Returned:
        return self.terms(self.net, x.detach().requires_grad_())


def loss_of(terms: Returned) -> Tensor:
    first, *others = ((each - 0.3 * k).square().mean() for k, each in enumerate(terms))
    return sum(others, first)


def trained(
    terms: Terms,
    *,
    inside: bool,
    build: Callable[[], nn.Module] = net,
    steps: int = 3,
    **options: Any,
) -> Tensor:
    """Return the weights after some steps."""
    whole = Inside(terms, build)
    opt = KFAC(whole if inside else whole.net, **options)
    x = X.clone().requires_grad_()
    for _ in range(steps):
        found = whole(X) if inside else terms(whole.net, x)
        opt.zero_grad()
        opt.observe(loss_of(found)).backward()
        opt.step()
    return weights(whole.net)
