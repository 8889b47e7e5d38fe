"""Complex convolutions against torch's own: values, and derivatives of either mode and order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import CONVOLUTIONS, TRANSPOSED, kernel_matrix
from torch import Tensor

from einconv_kfac.functionals import conv_transposeNd, convNd, foldNd, unfoldNd, unfoldNd_transpose
from einconv_kfac.geometry import Geometry, conv_geometry

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*batching rule for aten..unfold_backward",  # torch's own
    "ignore:.torch.jit.script. is deprecated",
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"groups": 2, "dilation": 2},
    {"groups": 4, "padding": 1},
]
CASES = pytest.mark.parametrize("options", OPTIONS, ids=str)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])
DIMENSIONS = pytest.mark.parametrize("ndim", [1, 2, 3])
DIRECTION = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])

Function = Callable[..., Tensor]


def waves(shape: torch.Size, phase: float) -> Tensor:
    """A complex tensor of numbers of about one."""
    angles = torch.arange(shape.numel(), dtype=torch.float64) + phase
    return torch.complex(angles.sin(), (2 * angles).cos()).reshape(shape)


def pair(ndim: int, transposed: bool, simplify: bool, options: dict[str, Any]) -> list[Function]:
    """Our function and torch's, of input, kernel and bias."""
    ours = conv_transposeNd if transposed else convNd
    torchs = (TRANSPOSED if transposed else CONVOLUTIONS)[ndim]
    return [
        lambda *tensors: ours(*tensors, **options, simplify=simplify),
        lambda *tensors: torchs(*tensors, **options),
    ]


def operands(ndim: int, options: dict[str, Any]) -> list[Tensor]:
    groups = options.get("groups", 1)
    shapes = (2, 4, *(6, 5, 7)[:ndim]), (4, 4 // groups, *[3] * ndim), (4,)
    return [waves(torch.Size(shape), phase) for phase, shape in enumerate(shapes)]


def derivatives(function: Function, tensors: list[Tensor]) -> Iterator[Tensor]:
    """The value, and derivatives of several kinds."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*tensors)
    v = waves(y.shape, 0.3).requires_grad_()
    gradients = torch.autograd.grad(y, tensors, v, create_graph=True)
    second = [waves(gradient.shape, 0.7) for gradient in gradients]
    yield from (y, *gradients)
    yield from torch.autograd.grad(gradients, [*tensors[:2], v], second)
    tangents = tuple(waves(tensor.shape, 0.9) for tensor in tensors)
    plain = tuple(tensor.detach() for tensor in tensors)
    yield torch.func.jvp(function, plain, tangents)[1]
    vectors = torch.stack([v.detach(), v.detach().conj()])
    yield from torch.autograd.grad(function(*tensors), tensors, vectors, is_grads_batched=True)
    yield from torch.func.vmap(torch.func.vjp(function, *plain)[1])(vectors)


@DIMENSIONS
@CASES
@SIMPLIFY
@DIRECTION
def test_derivatives_equal_torch(
    ndim: int, options: dict[str, Any], simplify: bool, transposed: bool
) -> None:
    functions = pair(ndim, transposed, simplify, options)
    results = [list(derivatives(function, operands(ndim, options))) for function in functions]
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs)


@CASES
@DIRECTION
def test_conjugate_and_negative_views(options: dict[str, Any], transposed: bool) -> None:
    x, weight, bias = operands(2, options)
    for view in (torch.conj, torch._neg_view):
        results = []
        for function in pair(2, transposed, True, options):
            tensors = [view(tensor).requires_grad_() for tensor in (x, weight, bias)]
            y = function(*tensors)
            results.append((y, *torch.autograd.grad(y, tensors, waves(y.shape, 0.3))))
        for ours, torchs in zip(*results):
            torch.testing.assert_close(ours, torchs)


@DIRECTION
def test_compiled(transposed: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(2, {})]
    ours, torchs = pair(2, transposed, True, {})
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    results = []
    for function in (compiled, torchs):
        y = function(*tensors)
        results.append((y, *torch.autograd.grad(y, tensors, waves(y.shape, 0.3))))
    for result, expected in zip(*results):
        torch.testing.assert_close(result, expected)


def test_per_example_gradients() -> None:
    x, weight, bias = operands(2, {})

    def gradients(function: Function) -> tuple[Tensor, Tensor]:
        def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
            return function(x[None], weight, bias).abs().square().sum()

        gradient = torch.func.grad(loss, argnums=(0, 1))
        return torch.func.vmap(gradient, in_dims=(None, None, 0))(weight, bias, x)

    for ours, torchs in zip(*map(gradients, pair(2, False, True, {}))):
        torch.testing.assert_close(ours, torchs)


def defined(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The forward pass from its definition, in any dimension."""
    xs = x.flatten(2).unflatten(1, (geometry.groups, -1))
    ws = weight.flatten(2).unflatten(0, (geometry.groups, -1))
    y = torch.einsum("ngci,koi,gdck->ngdo", xs, kernel_matrix(geometry).to(x.dtype), ws)
    return y.reshape(len(x), len(weight), *geometry.output_size)


@SIMPLIFY
@pytest.mark.parametrize("groups", [1, 2])
def test_four_dimensions(groups: int, simplify: bool) -> None:
    geometry = conv_geometry((3, 4, 3, 3), 2, 2, 1, groups=groups)
    tensors = [waves(torch.Size(s), 0) for s in ((2, 4, 3, 4, 3, 3), (4, 4 // groups, 2, 2, 2, 2))]
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups, "simplify": simplify}
    results = []
    for function in (lambda *t: convNd(*t, **options), lambda *t: defined(*t, geometry)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, waves(y.shape, 0.3), create_graph=True)
        second = [waves(gradient.shape, 0.7) for gradient in gradients]
        results.append((y, *gradients, *torch.autograd.grad(gradients, leaves, second)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected)


@SIMPLIFY
@pytest.mark.parametrize("function", [unfoldNd, unfoldNd_transpose, foldNd])
def test_unfolds_are_linear(function: Any, simplify: bool) -> None:
    """A real map of a complex tensor is the map of its two parts, and so is its adjoint."""
    shape, sizes = ((2, 8, 30), [(6, 7)]) if function is foldNd else ((2, 2, 6, 7), [])

    def linear(x: Tensor) -> Tensor:
        return function(x, *sizes, 2, simplify=simplify)

    x = waves(torch.Size(shape), 0).requires_grad_()
    y, real = linear(x), linear(x.detach().real.clone())
    torch.testing.assert_close(y, torch.complex(real, linear(x.detach().imag.clone())))
    v = waves(y.shape, 0.3)
    (gradient,) = torch.autograd.grad(y, x, v)
    pullback = torch.func.vjp(linear, x.detach().real.clone())[1]
    expected = [pullback(part.clone())[0] for part in (v.real, v.imag)]
    torch.testing.assert_close(gradient, torch.complex(*expected))
