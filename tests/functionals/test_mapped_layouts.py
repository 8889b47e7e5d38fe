"""`torch.func.vmap` and batched gradients, over tensors of any memory layout, against torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from oracles import CONVOLUTIONS, TRANSPOSED
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, vmap
from torch.nn import functional

from einconv_kfac.functionals import conv_transposeNd, convNd, foldNd, unfoldNd
from einconv_kfac.modules import ConvNd

pytestmark = pytest.mark.filterwarnings("ignore:.*batching rule for aten..unfold_backward")
OPTIONS: list[dict[str, Any]] = [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"groups": 4}]
CASES = pytest.mark.parametrize("options", OPTIONS, ids=str)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])
DIMENSIONS = pytest.mark.parametrize("ndim", [1, 2, 3])
DIRECTION = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])

Function = Callable[..., Tensor]


def channels_last(x: Tensor) -> Tensor:
    """The tensor ``[b, n, c, ..]`` with its channels innermost in memory."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": channels_last,
    "every second": lambda x: torch.stack([x, -x], -1)[..., 0],
}
ALL_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)


def pair(ndim: int, transposed: bool, options: dict[str, Any], **own: Any) -> list[Function]:
    """Our function and torch's, of input and kernel."""
    ours = conv_transposeNd if transposed else convNd
    torchs = (TRANSPOSED if transposed else CONVOLUTIONS)[ndim]
    return [
        lambda *tensors: ours(*tensors, **options, **own),
        lambda *tensors: torchs(*tensors, **options),
    ]


def operands(ndim: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, *(6, 5, 7)[:ndim], dtype=torch.float64)
    return x, torch.randn(3, 4, 4 // options.get("groups", 1), *[3] * ndim, dtype=torch.float64)


MAPPED = [(0, None), (-1, None), (None, 1), (0, 0), (1, -1), (2, 2)]
VALUES = (1, 2, 3), OPTIONS, (False, True), [*LAYOUTS], MAPPED
HALF = [
    tuple(own[index] for own, index in zip(VALUES, indices))
    for indices in product(*(range(len(own)) for own in VALUES))
    if sum(indices) % 2 == 0
]
"""Every second of all combinations, with every combination of any four arguments."""


@pytest.mark.parametrize(("ndim", "options", "transposed", "layout", "dims"), HALF)
def test_vmap_and_its_gradients(
    ndim: int,
    options: dict[str, Any],
    transposed: bool,
    layout: str,
    dims: tuple[int | None, int | None],
) -> None:
    x, weight = operands(ndim, options)
    x = LAYOUTS[layout](x)
    tensors = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((x, weight), dims)]

    def results(function: Function) -> tuple[Tensor, ...]:
        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight).sin().sum()

        gradients = vmap(grad(loss, argnums=(0, 1)), in_dims=dims)(*tensors)
        return vmap(function, in_dims=dims)(*tensors), *gradients

    for ours, torchs in zip(*map(results, pair(ndim, transposed, options))):
        torch.testing.assert_close(ours, torchs)


@SIMPLIFY
@ALL_LAYOUTS
def test_nested_vmap_of_a_transposed_input(layout: str, simplify: bool) -> None:
    x, weight = operands(2, {})
    x = LAYOUTS[layout](x)
    results = []
    for function in pair(2, False, {}, simplify=simplify):
        inner = vmap(lambda a, w, f=function: f(a.mT, w), in_dims=(0, None), out_dims=-1)
        results.append(vmap(inner, in_dims=(0, 0), out_dims=1)(x, weight))
    torch.testing.assert_close(*results)


def test_images_with_channels_last() -> None:
    layer = ConvNd(2, 3, 4, 3, dtype=torch.float64)
    images = torch.rand(8, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def gradients(function: Function) -> Tensor:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return function(x[None], parameters["weight"], parameters["bias"]).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, images)["weight"]

    torch.testing.assert_close(gradients(convNd), gradients(functional.conv2d))
    mapped = grad(lambda x: convNd(x, layer.weight).sum())(images)
    assert mapped.shape == images.shape
    outside = grad(lambda x: convNd(x, layer.weight).sum())
    torch.testing.assert_close(vmap(outside)(images[:, None])[:, 0], mapped)


@SIMPLIFY
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_unfold_and_fold(dim: int, simplify: bool) -> None:
    x = torch.rand(3, 2, 4, 6, 7, dtype=torch.float64).movedim(0, dim)
    results = [
        vmap(lambda a: unfoldNd(a.mT, 2, simplify=simplify), in_dims=dim, out_dims=dim)(x),
        vmap(lambda a: functional.unfold(a.mT, 2), in_dims=dim, out_dims=dim)(x),
    ]
    torch.testing.assert_close(*results)
    folds = [
        vmap(lambda a: foldNd(a, (7, 6), 2, simplify=simplify), in_dims=dim)(results[0]),
        vmap(lambda a: functional.fold(a, (7, 6), 2), in_dims=dim)(results[0]),
    ]
    torch.testing.assert_close(*folds)


@DIMENSIONS
@CASES
@DIRECTION
@pytest.mark.parametrize("batch", [1, 3])
def test_batched_gradients(
    ndim: int, options: dict[str, Any], transposed: bool, batch: int
) -> None:
    results = []
    for function in pair(ndim, transposed, options):
        x, weight = (t[0].requires_grad_() for t in operands(ndim, options))
        y = function(x, weight)
        torch.manual_seed(1)
        vectors = torch.randn(batch, *y.shape, dtype=torch.float64).requires_grad_()
        gradients = torch.autograd.grad(
            y, (x, weight), vectors, is_grads_batched=True, create_graph=True
        )
        loss = sum(gradient.pow(3).sum() for gradient in gradients)
        results.append((*gradients, *torch.autograd.grad(loss, (x, weight, vectors))))
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_vectorized_jacobians(strategy: str) -> None:
    x, weight = (t[0, :, :, :4, :4] for t in operands(2, {}))
    layer = nn.Conv2d(4, 3, 2, padding=1, padding_mode="reflect", dtype=torch.float64)
    layers = ConvNd.from_nn_Conv(layer), layer
    jacobians = [jacobian(f, x, vectorize=True, strategy=strategy) for f in layers]
    torch.testing.assert_close(*jacobians)
    results = []
    for function in pair(2, False, {}):
        arguments = x, weight
        results.append(jacobian(function, arguments, vectorize=True, strategy=strategy))
    for j, k in zip(*results):
        torch.testing.assert_close(j, k)


def test_vectorized_hessian_and_nested_jacobian() -> None:
    x, weight = (t[0, :1, :, :3, :3] for t in operands(2, {}))
    results = []
    for function in pair(2, False, {"padding": 1}):

        def cubed(x: Tensor, function: Function = function) -> Tensor:
            return function(x, weight).pow(3)

        def inner(x: Tensor, cubed: Function = cubed) -> Tensor:
            return jacobian(cubed, x, vectorize=True, create_graph=True)

        outer = jacobian(inner, x, vectorize=True)
        results.append((hessian(lambda x, f=cubed: f(x).sum(), x, vectorize=True), outer))
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs)
