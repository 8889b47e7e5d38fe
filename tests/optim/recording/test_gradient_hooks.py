"""Hooks that change or record gradients of a script's own backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

Change = Callable[[Tensor], Tensor | None]
ForwardHook = Callable[[nn.Module, Any, Tensor], None]


class Square(torch.autograd.Function):
    """A square without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


class Squared(nn.Module):
    """A square.

    Args:
        is_own: Whether it is the one without a forward mode.
    """

    def __init__(self, is_own: bool) -> None:
        super().__init__()
        self.is_own = is_own

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x) if self.is_own else x.square()


def net(is_own: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), Squared(is_own), nn.Linear(5, 1)
    return nn.Sequential(*parts).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(32, 4).double(), torch.randn(32, 1).double()


def trained(model: nn.Module) -> Tensor:
    """The parameters after some steps."""
    (x, y), loss_fn = batch(), nn.MSELoss()
    opt = KFAC(model, loss_fn, fisher="exact")
    for _ in range(3):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def clamped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def always(change: Change) -> ForwardHook:
    """Hook every output, which fails for one without a graph."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(change)

    return hook


def where_a_graph_is(change: Change) -> ForwardHook:
    """Hook outputs that have a graph, which those of a replay in forward mode have not."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(hook=change)

    return hook


@pytest.mark.parametrize("layer", [0, 1, 4])
@pytest.mark.parametrize("change", [halved, clamped])
def test_the_model_is_replayed_without_hooks(layer: int, change: Change) -> None:
    """So that products are those of its function, and the changed slope is reported."""
    found = []
    for is_own in (False, True):
        for attach in (where_a_graph_is, always):
            model = net(is_own)
            model[layer].register_forward_hook(attach(change))
            with pytest.warns(RuntimeWarning, match="of the slope along the step are not expl"):
                found.append(trained(model))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


@pytest.mark.parametrize("is_own", [False, True])
def test_hooks_of_modules_are_left_out_and_stay(is_own: bool) -> None:
    def halve(_: nn.Module, grad_input: tuple[Tensor], __: Any) -> tuple[Tensor]:
        return (grad_input[0] / 2,)

    hooked, other = net(is_own), net()
    handle = hooked[1].register_full_backward_hook(halve)
    other[0].register_forward_hook(where_a_graph_is(halved))
    with pytest.warns(RuntimeWarning, match="of the slope along the step are not explained"):
        torch.testing.assert_close(trained(hooked), trained(other))
    assert handle.id in hooked[1]._backward_hooks


@pytest.mark.parametrize("is_own", [False, True])
def test_a_step_leaves_recorded_gradients_alone(is_own: bool) -> None:
    model, (x, y), seen = net(is_own), batch(), list[Tensor]()
    model[2].register_forward_hook(always(seen.append))
    loss_fn = nn.MSELoss()
    opt = KFAC(model, loss_fn)
    inner = torch.func.grad(lambda h: loss_fn(model[4](h.square()), y))
    for _ in range(2):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        want, count = inner(model[2](model[1](model[0](x))).detach()), len(seen)
        opt.step()
        assert len(seen) == count
        torch.testing.assert_close(seen[-1], want)


class Keeping(nn.Module):
    """A network that keeps the gradient of its features, as for a heat map."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.features = net(), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.net[:2](x)
        self.features.retain_grad()
        return self.net[2:](self.features)


class Forces(nn.Module):
    """Minus the derivative of an energy, recorded by a hook or returned.

    Args:
        by_hook: Whether a hook records it.
    """

    def __init__(self, by_hook: bool) -> None:
        super().__init__()
        self.net, self.by_hook = net(), by_hook

    def forward(self, x: Tensor) -> Tensor:
        x, found = x.clone().requires_grad_(), list[Tensor]()
        inner = 1 * x
        if self.by_hook:
            inner.register_hook(lambda g: found.append(-g))
        energy = self.net(inner).sum()
        found += [-g for g in torch.autograd.grad(energy, [x], create_graph=True)]
        return found[0].sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("hooked", "plain"), [(Keeping, net), (lambda: Forces(True), lambda: Forces(False))]
)
def test_models_that_keep_gradients_of_their_own(
    hooked: Callable[[], nn.Module], plain: Callable[[], nn.Module]
) -> None:
    torch.testing.assert_close(trained(hooked()), trained(plain()))
