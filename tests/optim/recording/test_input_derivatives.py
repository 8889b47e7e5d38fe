"""Derivatives by arguments in the loop, beside the same derivatives in the model's ``forward``."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_cases import MODES, Returned, Terms, X, by, net, trained
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC


def first(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    y = u(x)
    return y, by(y, x)


def second(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    y = u(x)
    slope = by(y, x)
    return y, by(slope[:, :1], x)[:, 0], by(slope[:, 1:], x)[:, 1]


def third(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    return (by(by(by(u(x), x), x), x),)


def columns(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    """The model is called with columns that are put together."""
    place, time = x[:, :1].detach().requires_grad_(), x[:, 1:].detach().requires_grad_()
    y = u(torch.cat([place, time], 1))
    return by(y, time), by(by(y, place), place)


def weighted(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    y = u(x)
    return by(y, x, X[:, :1]), by(y, x, X[:, 1:])


def of_the_argument(u: Callable[[Tensor], Tensor], x: Tensor) -> Returned:
    """The argument is also used beside the model."""
    return (by(u(x) * X[:, :1] + x.square().sum(1, keepdim=True), x),)


TERMS: list[Terms] = [first, second, third, columns, weighted, of_the_argument]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("terms", TERMS)
def test_derivatives_in_the_loop_are_those_in_the_model(
    terms: Terms, options: dict[str, Any]
) -> None:
    found = trained(terms, inside=False, **options)
    expected = trained(terms, inside=True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, *, x: Tensor) -> Tensor:
        return self.net(x)


def test_an_argument_with_a_name() -> None:
    def trained_by(name: bool) -> Tensor:
        model = Named()
        opt, x = KFAC(model if name else model.net, fisher="exact"), X.clone().requires_grad_()
        for _ in range(2):
            y = model(x=x) if name else model.net(x)
            opt.zero_grad()
            opt.observe((y.square() + by(y, x).square()).mean()).backward()
            opt.step()
        return weights(model)

    torch.testing.assert_close(trained_by(name=True), trained_by(name=False), rtol=1e-9, atol=0)


def test_a_gradient_penalty_of_one_of_several_calls() -> None:
    """As that of a critic, whose curvature is by definition that of all outputs together."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, real: Tensor, fake: Tensor, between: Tensor) -> Returned:
            between = between.detach().requires_grad_()
            return self.net(fake), self.net(real), by(self.net(between), between)

    def trained_with(inside: bool) -> Tensor:
        model = Critic()
        opt = KFAC(model if inside else model.net, fisher="exact")
        real, fake, between = X, X.flip(0) + 0.1, (X + X.flip(0)) / 3
        for _ in range(3):
            if inside:
                on_fake, on_real, slope = model(real, fake, between)
            else:
                x = between.clone().requires_grad_()
                on_fake, on_real = model.net(fake), model.net(real)
                slope = by(model.net(x), x)
            penalty = (slope.norm(dim=1) - 1).square().mean()
            opt.zero_grad()
            opt.observe(on_fake.mean() - on_real.mean() + penalty).backward()
            opt.step()
        return weights(model.net)

    found, expected = trained_with(inside=False), trained_with(inside=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_argument_of_two_calls() -> None:
    """Each call has its part of the derivative."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return by(self.net(x) + self.net(2 * x), x)

    def trained_with(inside: bool) -> Tensor:
        model, x = Both(), X.clone().requires_grad_()
        opt = KFAC(model if inside else model.net, fisher="exact")
        for _ in range(2):
            slope = model(x) if inside else by(model.net(x) + model.net(2 * x), x)
            opt.zero_grad()
            opt.observe((slope - 1).square().mean()).backward()
            opt.step()
        return weights(model.net)

    found, expected = trained_with(inside=False), trained_with(inside=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_derivative_that_is_an_argument_of_a_later_call() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return self.net(by(self.net(x), x))

    def trained_with(inside: bool) -> Tensor:
        model, x = Later(), X.clone().requires_grad_()
        opt = KFAC(model if inside else model.net, fisher="exact")
        for _ in range(2):
            y = model(x) if inside else model.net(by(model.net(x), x))
            opt.zero_grad()
            opt.observe((y - 1).square().mean()).backward()
            opt.step()
        return weights(model)

    found, expected = trained_with(inside=False), trained_with(inside=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_by_an_argument_is_that_of_torch() -> None:
    """Also where it is taken with the backward pass of the loss."""
    model, x = net(), X.clone().requires_grad_()
    opt = KFAC(model)
    model(x).square().mean().backward()
    known = x.grad
    x.grad = None
    opt.remove_hooks()
    model(x).square().mean().backward()
    assert known is not None
    assert torch.equal(known, x.grad)


class Sign:
    """Belongs to a graph while that exists."""


@pytest.mark.parametrize("options", MODES)
def test_steps_leave_no_graph_behind(options: dict[str, Any]) -> None:
    model, x = net(), X.clone().requires_grad_()
    opt, graphs = KFAC(model, **options), list[weakref.ref[Sign]]()
    gc.disable()  # reference counts must do, since a cycle through a graph is never found
    try:
        for _ in range(2):
            y = model(x)
            slope = by(y, x)
            opt.zero_grad()
            opt.observe(slope.square().mean() + y.square().mean()).backward()
            for own in (y, slope):
                own.grad_fn.metadata["test"] = sign = Sign()
                graphs.append(weakref.ref(sign))
            del own, sign
            del y, slope
            opt.step()
    finally:
        gc.enable()
    assert not [own for own in graphs if own() is not None]
