"""Backward passes through a part of the graph of a loss."""

from __future__ import annotations

from typing import Any

import torch
from optim_cases import train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature.objective.graph import Edge, backpropagated, dependents, edge_of


def chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = x.sin()
    return x


def test_gradients_are_those_of_autograd() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    h = x.exp()
    loss = (chain(h, 3) * h).sum() + (h * x).square().mean()

    def stops(edge: Edge) -> bool:
        return edge == edge_of(x)

    nodes = dependents(edge_of(loss), stops)
    found = backpropagated({edge_of(loss): torch.ones_like(loss)}, nodes, stops)
    torch.testing.assert_close(found[edge_of(x)], torch.autograd.grad(loss, x)[0])


def test_only_nodes_with_gradients_are_visited() -> None:
    x = torch.randn(3, requires_grad=True)
    terms = [chain(x * index, 4) for index in range(50)]
    loss = torch.stack(terms).sum()
    visited: dict[Edge, Tensor] = {}

    def stops(edge: Edge) -> bool:
        asked.append(edge)
        return edge == edge_of(x)

    asked: list[Edge] = []
    nodes = dependents(edge_of(loss), stops)
    asked.clear()
    found = backpropagated({edge_of(terms[7]): torch.ones(3)}, nodes, stops, visited)
    torch.testing.assert_close(found[edge_of(x)], torch.autograd.grad(terms[7].sum(), x)[0])
    assert len(nodes) > 200
    assert len(visited) == len(asked) == 5


class Round(torch.autograd.Function):
    """Rounds, with the gradient of what it rounds: a straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent


class RoundedLoss(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = (Round.apply(8 * output) / 8 - target).square().mean()
        return loss


def test_a_function_of_users_with_the_name_of_a_constant_one_has_its_gradient() -> None:
    torch.manual_seed(0)
    model, loss_fn, x = nn.Linear(4, 2), RoundedLoss(), torch.randn(64, 4)
    opt, batch = KFAC(model, loss_fn), (x, x[:, :2] - x[:, 2:])
    losses = [train_step(model, loss_fn, opt, batch) for _ in range(10)]
    assert losses[-1] < 0.05 * losses[0]
