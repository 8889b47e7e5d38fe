"""Derivatives by arguments, and with vectors, that depend on the model or on other tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from derivative_cases import MODES, Returned, Terms, X, by, loss_of, net, trained
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.optim.recording.kept_calls import SMALL_CALLS_WITHOUT_LOSS
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.replay import Replay

T = torch.linspace(0.3, 1.7, 6, dtype=torch.float64)[:, None]
Build = Callable[[], nn.Module]


class Parts(nn.Module):
    """An encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = net(2, 3, nn.Tanh()), net(3, 2)


class Nested(nn.Module):
    """Is called with a place and a time in one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(3, 2)

    def forward(self, given: Any) -> Tensor:
        x, t = (given["x"], given["more"][0]) if isinstance(given, dict) else given
        return self.net(torch.cat([x, t], 1))


class Several(nn.Module):
    """Returns outputs, of which some depend on others."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = net(2, 2), net(2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        energies = self.head(y)
        return {"y": y, "twice": 2 * y, "energies": energies, "total": energies.sum()}


class Coefficient(nn.Module):
    """A network with a coefficient that only the loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = net(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Shift(nn.Module):
    """Adds its first argument: the derivative by it is a part of that by the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(2, 2)

    def forward(self, shift: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(shift + self.net(x))


def code(model: Parts, x: Tensor) -> Returned:
    h = model.encoder(x)
    y = model.decoder(h)
    return y, by(y, h)


def code_and_input(model: Parts, x: Tensor) -> Returned:
    h = model.encoder(x)
    y = model.decoder(h)
    return y, by(y, h), by(y, x), by(h, x), by(by(y, x), x)


def between_parts(model: Parts, x: Tensor) -> Returned:
    h = model.encoder(x)
    scaled = 2 * h.sin()
    y = model.decoder(scaled)
    return y, by(y, scaled), by(by(y, h), h), by(by(y, x), x)


def entries_of(arrange: Callable[[Tensor, Tensor], Any]) -> Terms:
    def terms(model: Nested, x: Tensor) -> Returned:
        x, t = x.detach().clone().requires_grad_(), T.clone().requires_grad_()
        y = model(arrange(x, t))
        return y, by(y, t), by(by(y, x), x), by(by(y, x), t)

    return terms


def of_a_square(u: nn.Module, x: Tensor) -> Returned:
    y = u(x)
    return y, by(y.square(), x), by(by(y.square(), x), x)


def boundary(u: nn.Module, x: Tensor) -> Returned:
    """The output is multiplied by a function that is zero at the boundary."""
    y = (x * (1 - x)).prod(1, keepdim=True) * u(x)
    slope = by(y, x)
    return y, slope, by(slope[:, 0], x)[:, 0], by(slope[:, 1], x)[:, 1]


def features(u: nn.Module, x: Tensor) -> Returned:
    y = u(torch.sin(3 * x)).tanh()
    slope = by(y, x)
    return y, slope, by(slope[:, 0], x)


def cross_entropy(u: nn.Module, x: Tensor) -> Returned:
    y = u(x)
    return y, by(functional.cross_entropy(y, torch.tensor([0, 1, 2, 0, 1, 2])), x)


def directional(u: nn.Module, x: Tensor) -> Returned:
    """A Jacobian-vector product by two backward passes."""
    y = u(x)
    vector = torch.ones_like(y).requires_grad_()
    return y, by(by(y, x, vector), vector, torch.full_like(x, 0.5))


def last_tanh(u: nn.Module, x: Tensor) -> Returned:
    y = u(x)
    return y, by(by(y, x), x)


class Pair(NamedTuple):
    """Two outputs, of which the second one depends on the first one."""

    y: Tensor
    twice: Tensor


class Named(Several):
    """Returns a tuple with names."""

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        y = self.net(x)
        return Pair(y, 2 * y)


def named(model: Named, x: Tensor) -> Returned:
    out = model(x)
    return out.y, by(out.twice, x)


def several(model: Several, x: Tensor) -> Returned:
    out = model(x)
    second = by(by(out["energies"], x), x)
    return out["y"], out["energies"], by(out["total"], x), by(out["twice"], x), second


def coefficient(model: Coefficient, x: Tensor) -> Returned:
    u = model(x)
    return u, by(model.factor * u, x)


def vector_of_derivatives(u: nn.Module, x: Tensor) -> Returned:
    slope = by(u(x), x)
    return slope, by(slope, x, slope), by(slope.square().sum(1), x)


def by_a_shift(model: Shift, x: Tensor) -> Returned:
    shift = x.detach().clone().requires_grad_()
    y = model(shift, x)
    by_shift, by_x = torch.autograd.grad(y.square().sum(), (shift, x), create_graph=True)
    return y, by_shift, by(by_x, x), by(by_x.sin(), shift)


def two_calls(u: nn.Module, x: Tensor) -> Returned:
    """Each of two calls is the vector of the other."""
    y, z = u(x), u(2 * x)
    return y, by(y * z, x)


def residual(u: nn.Module, x: Tensor) -> Returned:
    """The gradient of a residual that is not linear."""
    y = u(x)
    slope = by(y, x)
    own = by(slope[:, 0], x)[:, 0] + slope[:, 1] * y[:, 0]
    return y, own, by(own, x)


def lagrangian(u: nn.Module, x: Tensor) -> Returned:
    """The acceleration of a system with one coordinate."""
    y = u(x)
    slope = by(y[:, 0].square() + y[:, 1] + 3 * x[:, 1].square(), x)
    second = by(slope[:, 1], x)
    return ((slope[:, 0] - second[:, 0] * x[:, 1]) / second[:, 1],)


CASES: dict[str, tuple[Terms, Build]] = {
    "code": (code, Parts),
    "code and input": (code_and_input, Parts),
    "between parts": (between_parts, Parts),
    "tuple": (entries_of(lambda x, t: (x, t)), Nested),
    "dictionary": (entries_of(lambda x, t: {"x": x, "more": [t]}), Nested),
    "square": (of_a_square, net),
    "boundary": (boundary, net),
    "features": (features, net),
    "cross entropy": (cross_entropy, lambda: net(2, 3)),
    "directional": (directional, lambda: net(2, 3)),
    "last tanh": (last_tanh, lambda: net(2, 2, nn.Tanh())),
    "several outputs": (several, Several),
    "named outputs": (named, Named),
    "coefficient": (coefficient, Coefficient),
    "vector of derivatives": (vector_of_derivatives, net),
    "a shift": (by_a_shift, Shift),
    "two calls": (two_calls, net),
    "residual": (residual, net),
    "Lagrangian": (lagrangian, lambda: net(2, 2)),
}


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_in_the_loop_are_those_in_the_model(name: str, options: dict[str, Any]) -> None:
    terms, build = CASES[name]
    found = trained(terms, inside=False, build=build, steps=2, **options)
    expected = trained(terms, inside=True, build=build, steps=2, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def one_square(u: nn.Module, x: Tensor) -> Returned:
    y = u(x)
    return y, by(y.square(), x)


def one_vector(u: nn.Module, x: Tensor) -> Returned:
    slope = by(u(x), x)
    return slope, by(slope, x, slope)


def functional_square(u: Callable[[Tensor], Tensor]) -> Returned:
    y, derivative = torch.func.vjp(u, X)
    return y, derivative(2 * y)[0]


def functional_vector(u: Callable[[Tensor], Tensor]) -> Returned:
    slope, derivative = torch.func.vjp(torch.func.grad(lambda x: u(x).sum()), X)
    return slope, derivative(slope)[0]


def functional_direction(u: Callable[[Tensor], Tensor]) -> Returned:
    y, product = torch.func.jvp(u, (X,), (torch.full_like(X, 0.5),))
    return y, product


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize(
    ("terms", "twin", "outputs"),
    [
        (one_square, functional_square, 1),
        (one_vector, functional_vector, 1),
        (directional, functional_direction, 3),
    ],
)
def test_jacobian_products_are_those_of_functional_derivatives(
    terms: Terms, twin: Callable[..., Returned], outputs: int, forward_mode: bool
) -> None:
    """By the parameters, in either mode."""
    model = net(2, outputs)
    recorder = Recorder(model, None, lambda *_: frozenset())
    recorder.keeps_outputs = True
    recorder.observed(loss_of(terms(model, X.clone().requires_grad_()))).backward()
    (batch,) = recorder.take()
    recorder.remove()
    parameters = {name: own.detach() for name, own in model.named_parameters()}
    direction = {name: torch.full_like(own, 0.3) for name, own in parameters.items()}

    def function(own: dict[str, Tensor]) -> Returned:
        return twin(lambda x: torch.func.functional_call(model, own, (x,)))

    values, expected = torch.func.jvp(function, (parameters,), (direction,))
    replay = Replay(model)
    replay.forward_mode = forward_mode
    (products,) = replay.jacobian_products(batch, parameters, [direction])
    for known, product in zip(batch.outputs, products):
        found = [p for own, p in zip(values, expected) if torch.allclose(own, known)]
        torch.testing.assert_close(product, *found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", MODES)
def test_what_a_model_changes_in_its_arguments(options: dict[str, Any]) -> None:
    """The script's own dictionary and list have it afterwards."""

    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, given: dict[str, Any]) -> Tensor:
            given["energies"] = self.net(given["places"])
            given["steps"].append(given.pop("old"))
            energies: Tensor = given["energies"]
            return energies.sum(1)

    model, x = Filling(), X.clone().requires_grad_()
    opt, steps = KFAC(model, **options), list[int]()
    given = {"places": x, "old": 3, "steps": steps}
    y = model(given)
    assert list(given) == ["places", "steps", "energies"]
    assert given["places"] is x
    assert given["steps"] is steps
    opt.observe((y.square() + by(y, x).square().sum(1)).mean()).backward()
    opt.step()
    assert steps == [3]


def test_a_vector_that_changes_in_place_after_the_derivative() -> None:
    def train(vector: Tensor, *, refilled: bool) -> Tensor:
        model, x = net(), X.clone().requires_grad_()
        opt = KFAC(model, fisher="exact")
        for _ in range(2):
            opt.zero_grad()
            loss = opt.observe(by(model(x), x, vector).square().mean())
            if refilled:
                vector = vector.clone()
            loss.backward()
            vector.add_(1)
            opt.step()
            vector.sub_(1)
        return weights(model)

    expected = train(X[:, :1].clone(), refilled=True)
    assert torch.equal(train(X[:, :1].clone(), refilled=False), expected)


def test_an_output_that_another_one_depends_on_may_change_in_place() -> None:
    def train(*, in_place: bool) -> Tensor:
        model, x = Several(), X.clone().requires_grad_()
        opt = KFAC(model, fisher="exact")
        for _ in range(2):
            out = model(x)
            y = out["y"].mul_(2) if in_place else 2 * out["y"]
            opt.zero_grad()
            opt.observe((y.square().sum(1) + by(out["total"], x).square().sum(1)).mean()).backward()
            opt.step()
        return weights(model)

    torch.testing.assert_close(train(in_place=True), train(in_place=False), rtol=1e-9, atol=0)


class Sign:
    """Belongs to a graph while that exists."""


@pytest.mark.parametrize("options", MODES)
def test_steps_leave_no_graph_behind(options: dict[str, Any]) -> None:
    model, x = Parts(), X.clone().requires_grad_()
    opt, graphs = KFAC(model, **options), list[weakref.ref[Sign]]()
    gc.disable()  # reference counts must do, since a cycle through a graph is never found
    try:
        for _ in range(2):
            h = model.encoder(x)
            y = model.decoder(h)
            slope = by(y.square(), h)
            opt.zero_grad()
            opt.observe(slope.square().mean() + by(slope, x).square().mean()).backward()
            for own in (h, y, slope):
                own.grad_fn.metadata["test"] = sign = Sign()
                graphs.append(weakref.ref(sign))
            del own, sign
            del h, y, slope
            opt.step()
    finally:
        gc.enable()
    assert not [own for own in graphs if own() is not None]


def test_calls_without_a_loss_are_dropped() -> None:
    """Though what is known of a vector keeps the graph of its call."""
    model, x = net(), X.clone().requires_grad_()
    opt, graphs = KFAC(model), list[weakref.ref[Sign]]()
    for _ in range(SMALL_CALLS_WITHOUT_LOSS + 20):
        y = model(x)
        by(y.square(), x)
        y.grad_fn.metadata["test"] = sign = Sign()
        graphs.append(weakref.ref(sign))
        del y, sign
    assert sum(own() is not None for own in graphs) <= SMALL_CALLS_WITHOUT_LOSS + 1
    opt.remove_hooks()
    assert not [own for own in graphs if own() is not None]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Build, dict[str, Any], str]] = {
    "a vector of unknown operations": (
        lambda u, x: by(functional.leaky_relu(u(x)), x),
        net,
        {},
        r"or a vector that its derivative is taken with, must be known .*got LeakyReluBackward\.",
    ),
    "vectors for a part of the examples": (
        lambda u, x: by(u(x).square(), x),
        net,
        {"curvature_fraction": 0.5},
        "vectors of its derivatives, must not depend on its outputs when `curvature_fraction`",
    ),
    "a sum over the examples": (
        lambda u, x: by(u(x)["total"], x),
        Several,
        {"curvature_fraction": 0.5},
        r"examples in the first dimension when `curvature_fraction` .* of an output \[\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_derivatives(name: str) -> None:
    slope, build, options, words = REFUSED[name]
    model, x = build(), X.clone().requires_grad_()
    opt = KFAC(model, **options)
    opt.observe(slope(model, x).square().mean()).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=words):
        opt.step()
    assert torch.equal(weights(model), before)
