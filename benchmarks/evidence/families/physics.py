"""A Poisson problem on the unit square, solved by a physics-informed network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.autograd import grad

from evidence.data import Sources
from evidence.examples import Examples, Split
from evidence.task import Family

_GRID = 41  # points per axis


def solution(points: Tensor) -> Tensor:
    """Return ``sin(pi x) sin(2 pi y)`` at points ``[n, 2]`` as ``[n]``."""
    return (pi * points[:, 0]).sin() * (2 * pi * points[:, 1]).sin()


class PoissonResidual(nn.Module):
    """The residual at inner points, beside the values at points of the boundary.

    Args:
        width: Units of each of the two hidden layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, 2]`` for ``[n, 4]``, an inner point and one of the boundary each.

        The residual is divided by 10, and the boundary's value multiplied by 3.
        """
        with torch.enable_grad():  # evaluations turn gradients off
            inner = x[:, :2].detach().requires_grad_()
            (slope,) = grad(self.network(inner).sum(), inner, create_graph=True)
            second = [grad(slope[:, i].sum(), inner, create_graph=True)[0][:, i] for i in (0, 1)]
            residual = second[0] + second[1] + 5 * pi**2 * solution(inner)
        return torch.stack([residual / 10, 3 * self.network(x[:, 2:]).squeeze(1)], 1)


@dataclass(frozen=True)
class Poisson(Family):
    """Residual and boundary values are to be zero; the test is the relative L2 error on a grid.

    Args:
        points: Inner points, and as many of the boundary.
    """

    points: int = 600
    metric: ClassVar[str] = "L2 error"
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {
        "SGD": (1e-3, 1e-1),
        "AdamW": (4.37e-3, 0.175),
        "SOAP": (9.56e-3, 0.478),
        "Muon": (1.91e-2, 0.765),
    }

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"unit square, {self.points} points"

    def data(self, sources: Sources) -> Split:
        """See `Family`."""
        n, generator = self.points, Generator().manual_seed(3)
        inner, t = torch.rand(n, 2, generator=generator), torch.rand(n, generator=generator)
        end, first = torch.arange(n) % 2, torch.arange(n) % 4 < 2
        edge = torch.stack([torch.where(first, end, t), torch.where(first, t, end)], 1)
        axis = torch.linspace(0, 1, _GRID)
        grid = torch.cartesian_prod(axis, axis)
        train = Examples(torch.cat([inner, edge], 1), torch.zeros(n, 2))
        return Split(train, Examples(grid, solution(grid)))

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.MSELoss()

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        network = model.get_submodule("network")
        return float((network(examples.x)[:, 0] - examples.y).norm() / examples.y.norm())
