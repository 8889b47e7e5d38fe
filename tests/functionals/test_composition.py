"""Functionals under torch's transforms, types, layouts and tracers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac.functionals import (
    conv_transposeNd,
    convNd,
    foldNd,
    unfoldNd,
    unfoldNd_transpose,
)
from einconv_kfac.modules import ConvNd, ConvTransposeNd

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own

OPTIONS: list[dict[str, Any]] = [
    {"stride": 2, "padding": 1},
    {"groups": 4, "padding": 1},
    {"groups": 2, "dilation": 2, "stride": (1, 3)},
    {"groups": 4, "stride": 2},
]
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)


def tensors(options: dict[str, Any], *sizes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(sizes or (6, 7)), dtype=torch.float64)
    return x, torch.randn(4, 4 // options.get("groups", 1), 3, 3, dtype=torch.float64)


@ALL_OPTIONS
def test_gradients(options: dict[str, Any]) -> None:
    operands = [t.requires_grad_() for t in tensors(options, 5, 6)]
    for function in (convNd, conv_transposeNd):

        def contract(x: Tensor, weight: Tensor, function: Any = function) -> Tensor:
            return function(x, weight, **options)

        assert torch.autograd.gradcheck(contract, operands, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(contract, operands, fast_mode=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: unfoldNd(x, (2, 3), 1, 1, (2, 1)),
        lambda x: foldNd(unfoldNd(x, 2), (4, 5), 2, padding=0),
        lambda x: unfoldNd_transpose(x, 2, 2, 1),
    ],
    ids=["unfold", "fold", "transposed"],
)
def test_gradients_of_unfolds(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)
    mapped = torch.vmap(function)(x.detach()[None].repeat(3, 1, 1, 1, 1))
    torch.testing.assert_close(mapped[2], function(x.detach()))


@ALL_OPTIONS
def test_function_transforms(options: dict[str, Any]) -> None:
    x, weight = tensors(options)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return convNd(x, weight, **options).pow(3).mean()

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, **options).pow(3).mean()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        for argument in (0, 1):
            results = [transform(f, argnums=argument)(x, weight) for f in (ours, torchs)]
            torch.testing.assert_close(*results)


@ALL_OPTIONS
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_vmap(options: dict[str, Any], in_dims: tuple[int | None, int | None]) -> None:
    operands = [
        t if dim is None else torch.stack([t, 2 * t.flip(0), t.cos()], dim)
        for t, dim in zip(tensors(options), in_dims)
    ]

    def gradients(function: Any) -> Any:
        def both(x: Tensor, weight: Tensor) -> Any:
            y, pullback = torch.func.vjp(lambda x, w: function(x, w, **options), x, weight)
            return y, *pullback(y.sin())

        return torch.vmap(both, in_dims=in_dims)(*operands)

    for ours, torchs in zip(gradients(convNd), gradients(functional.conv2d)):
        torch.testing.assert_close(ours, torchs)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_without_graph_breaks() -> None:
    layers = ConvNd(2, 4, 4, 3, padding="same", groups=2), ConvTransposeNd(2, 4, 2, 2, 2)
    model = torch.nn.Sequential(*layers).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in [(2, 4, 5, 6), (3, 4, 5, 6), (3, 4, 7, 8)]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
        gradients = [torch.autograd.grad(m(x).pow(2).sum(), x)[0] for m in (compiled, model)]
        torch.testing.assert_close(*gradients)

    def unfolds(x: Tensor) -> Tensor:
        return foldNd(unfoldNd(x, 2), (5, 6), 2) + unfoldNd_transpose(x, 1).view_as(x)

    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(
        torch.compile(unfolds, fullgraph=True, backend="eager")(x), unfolds(x)
    )


@pytest.mark.usefixtures("fresh_dynamo")
def test_contractions_as_given_compile_without_graph_breaks() -> None:
    layers = ConvNd(1, 4, 4, 3, simplify=False), ConvTransposeNd(1, 4, 2, 2, 2, simplify=False)
    model = torch.nn.Sequential(*layers).double()

    def transformed(x: Tensor) -> Tensor:
        return model(foldNd(unfoldNd(x, 2, simplify=False), 6, 2, simplify=False))

    x = torch.randn(2, 4, 6, dtype=torch.float64)
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transformed(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_exports() -> None:
    model = torch.nn.Sequential(ConvNd(2, 4, 6, 3, stride=2), ConvTransposeNd(2, 6, 2, 2, 2))
    x = torch.randn(2, 4, 7, 6)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@ALL_OPTIONS
def test_types(dtype: torch.dtype, options: dict[str, Any]) -> None:
    x, weight = tensors(options)
    operands = [t.to(dtype).requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in operands]
    ours, expected = convNd(*operands, **options), functional.conv2d(*exact, **options)
    tolerance = 4 * torch.finfo(dtype).eps
    close = {"rtol": tolerance, "atol": 20 * tolerance}
    results = ours, *torch.autograd.grad(ours.sum(), operands)
    for result, correct in zip(results, (expected, *torch.autograd.grad(expected.sum(), exact))):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), correct, **close)


def test_autocast_and_layout() -> None:
    layer = ConvNd(2, 4, 6, 3)
    x = torch.randn(2, 4, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x))


def test_flop_counter_sees_the_products() -> None:
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3)
    counts = []
    for function in (convNd, functional.conv2d):
        with FlopCounterMode(display=False) as counter:
            function(x, weight)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_layers_copy_and_pickle() -> None:
    layer = ConvNd(4, 2, 4, 2, padding=((0, 1),) * 4, simplify=False)
    x = torch.randn(1, 2, 3, 3, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x))
