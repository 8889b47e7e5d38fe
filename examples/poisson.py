"""Solve a Poisson problem by a physics-informed network, with KFAC and with Adam at its best rate.

On the unit square, ``-laplace(u) = f`` with ``u = 0`` on the boundary; ``f`` is chosen so that
``u(x, y) = sin(pi x) sin(pi y)``. A network is trained to have this Laplacian at points inside, and
the value zero at points of the boundary. Its derivatives are taken by autograd in the ``forward``
of a module, and KFAC trains that module on its defaults. Adam takes ten times as many steps, with a
cosine, at each of several learning rates. The script prints the relative L2 errors on a grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from math import pi

import torch
from torch import Generator, Tensor, nn
from torch.autograd import grad
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from einconv_kfac import KFAC

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # learning rates of Adam
BOUNDARY_WEIGHT = 100.0
INSIDE, BOUNDARY = 900, 120  # numbers of points
GRID = torch.cartesian_prod(torch.linspace(0, 1, 51), torch.linspace(0, 1, 51))


def solution(points: Tensor) -> Tensor:
    """Return ``u`` at points ``[n, 2]``."""
    return (pi * points).sin().prod(1)


class Residuals(nn.Module):
    """The Poisson equation's residual inside, and the deviation on the boundary."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
        self.network = nn.Sequential(*hidden, nn.Linear(32, 1))

    def forward(self, inside: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``laplace(u) + f`` at points ``[n, 2]``, and ``u`` at points ``[m, 2]``."""
        inside = inside.detach().requires_grad_()
        (slope,) = grad(self.network(inside).sum(), inside, create_graph=True)  # [n, 2]
        second = (grad(slope[:, i].sum(), inside, create_graph=True)[0][:, i] for i in range(2))
        return sum(second) + 2 * pi**2 * solution(inside), self.network(boundary).squeeze(1)

    @torch.no_grad()
    def error(self) -> float:
        """Return the relative L2 error of the network on a grid."""
        expected = solution(GRID)
        return float((self.network(GRID).squeeze(1) - expected).norm() / expected.norm())


def sample_points(seed: int) -> tuple[Tensor, Tensor]:
    """Draw points inside of the square and on its four sides in turn, ``[n, 2]`` and ``[m, 2]``."""
    generator = Generator().manual_seed(seed)
    inside, t = (
        torch.rand(INSIDE, 2, generator=generator),
        torch.rand(BOUNDARY, generator=generator),
    )
    end, first = torch.arange(BOUNDARY) % 2, torch.arange(BOUNDARY) % 4 < 2
    return inside, torch.stack([torch.where(first, end, t), torch.where(first, t, end)], 1)


def train(seed: int, steps: int, build: Callable[[nn.Module], Optimizer]) -> float:
    """Train a network with the optimizer that ``build`` returns, and return its error."""
    torch.manual_seed(seed)
    model = Residuals()
    optimizer = build(model)
    decay = None if isinstance(optimizer, KFAC) else CosineAnnealingLR(optimizer, steps)
    inside, boundary = sample_points(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        residual, deviation = model(inside, boundary)
        loss = residual.square().mean() + BOUNDARY_WEIGHT * deviation.square().mean()
        if isinstance(optimizer, KFAC):
            loss = optimizer.observe(loss)
        loss.backward()
        optimizer.step()
        if decay is not None:
            decay.step()
    return model.error()


def adam(rate: float, model: nn.Module) -> Optimizer:
    """Return Adam with the learning rate."""
    return Adam(model.parameters(), lr=rate)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train with KFAC and with Adam; print and return the errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of KFAC (100)")
    parser.add_argument("--multiple", type=int, default=10, help="Adam's steps by KFAC's (10)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="those of Adam")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and points (0)")
    options = parser.parse_args(arguments)
    errors = {"KFAC": train(options.seed, options.steps, KFAC)}
    print(f"{'KFAC':12} {options.steps:5} steps: relative error {errors['KFAC']:.2e}", flush=True)
    for rate in options.rates:
        name, steps = f"Adam {rate:g}", options.multiple * options.steps
        errors[name] = train(options.seed, steps, partial(adam, rate))
        print(f"{name:12} {steps:5} steps: relative error {errors[name]:.2e}", flush=True)
    return errors


if __name__ == "__main__":
    main()
