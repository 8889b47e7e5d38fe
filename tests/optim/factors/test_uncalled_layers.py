"""Layers that a model uses without calling them, or inside of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import train_step
from torch import Tensor, nn
from torch.func import jacfwd, jvp, vmap
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


class Wrapped(nn.Module):
    """Runs a function of a network and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net, x)


def by_autograd(net: nn.Sequential, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope.sum(1, keepdim=True)


def by_jvp(net: nn.Sequential, x: Tensor) -> Tensor:
    tangent: Tensor = jvp(net, (x,), (torch.ones_like(x),))[1]
    return tangent


def by_jacfwd(net: nn.Sequential, x: Tensor) -> Tensor:
    slopes: Tensor = vmap(jacfwd(net))(x)
    return slopes.sum(2)


def by_forward(net: nn.Sequential, x: Tensor) -> Tensor:
    output: Tensor = net[2].forward(net[0](x).tanh())  # as in TAGConv of PyTorch Geometric
    return output


def by_functional(net: nn.Sequential, x: Tensor) -> Tensor:
    hidden = functional.linear(x, net[0].weight, net[0].bias).tanh()
    return functional.linear(hidden, net[2].weight, net[2].bias)


def trained(function: Callable[[Any, Tensor], Tensor], steps: int, **options: Any) -> Wrapped:
    """A model after some steps."""
    model, loss_fn = Wrapped(function), nn.MSELoss()
    torch.manual_seed(1)
    x, y = torch.randn(12, 2).double(), torch.randn(12, 1).double()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    losses = [train_step(model, loss_fn, opt, (x, y)) for _ in range(steps)]
    assert losses[-1] < losses[0]
    return model


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("function", [by_jvp, by_jacfwd])
def test_derivatives_by_torch_func_are_those_of_autograd(
    function: Callable[[Any, Tensor], Tensor], options: dict[str, Any]
) -> None:
    expected, found = (trained(each, 4, **options) for each in (by_autograd, function))
    for a, b in zip(found.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", [by_forward, by_functional])
def test_factors_are_those_of_one_pass_over_data(
    function: Callable[[Any, Tensor], Tensor],
) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(12, 2).double(), torch.randn(12, 1).double()
    model, loss_fn = Wrapped(function), nn.MSELoss()
    factors = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact")
    opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, fisher="exact")
    loss_fn(model(x), y).backward()
    opt.step()
    saved = opt.state_dict()["kfac"]["preconditioner"]["layers"]
    for name, block in factors.items():
        a, b = saved[name]["factors"]
        torch.testing.assert_close(torch.kron(b[0], a[0]), torch.kron(block.B[0], block.A[0]))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("function", [by_forward, by_functional])
def test_layers_that_are_not_called_train(
    function: Callable[[Any, Tensor], Tensor], options: dict[str, Any]
) -> None:
    trained(function, 10, **options)
