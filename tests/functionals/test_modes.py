"""Autocast, meta tensors, empty batches, inference mode and default devices, as in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracles import CONVOLUTIONS, TRANSPOSED
from torch import Tensor
from torch.nn import functional

from einconv_kfac.functionals import conv_transposeNd, convNd, foldNd, unfoldNd, unfoldNd_transpose
from einconv_kfac.modules import ConvNd, ConvTransposeNd

SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])
DIRECTION = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
TYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.int64),
]

Function = Callable[..., Tensor]


def pair(ndim: int, transposed: bool, simplify: bool) -> tuple[Function, Function]:
    """Our function and torch's."""
    ours = conv_transposeNd if transposed else convNd
    torchs = (TRANSPOSED if transposed else CONVOLUTIONS)[ndim]
    return lambda *t, **options: ours(*t, **options, simplify=simplify), torchs


@SIMPLIFY
@DIRECTION
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_autocast_casts_what_torch_casts(
    dtype: torch.dtype, transposed: bool, simplify: bool
) -> None:
    torch.manual_seed(0)
    tensors = [(2 * torch.randn(s)).to(dtype) for s in ((2, 3, 5, 5), (3, 3, 2, 2), (3,))]
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = (function(*tensors) for function in pair(2, transposed, simplify))
    assert ours.dtype == torchs.dtype
    if dtype in (torch.float64, torch.complex128, torch.int64):
        torch.testing.assert_close(ours, torchs)


@DIRECTION
def test_autocast_of_one_tensor_is_refused_as_in_torch(transposed: bool) -> None:
    ours, torchs = pair(2, transposed, True)
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(3, 3, 2, 2)
    for tensors in ((x, weight.double()), (x.cfloat(), weight)):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(RuntimeError):
                torchs(*tensors)
            with pytest.raises(ValueError, match=r"`weight` must be torch\..*, as `x`, got"):
                ours(*tensors)


@DIRECTION
def test_backward_inside_of_autocast_keeps_the_types_of_the_forward_pass(transposed: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(s).requires_grad_() for s in ((2, 3, 5, 5), (3, 3, 2, 2))]
    results = []
    for function in pair(2, transposed, True):
        y = function(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs)


def test_unfold_and_fold_under_autocast() -> None:
    x = torch.randn(2, 3, 5, 5)
    for simplify in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            columns = unfoldNd(x, 2, simplify=simplify)
            image = foldNd(columns, (5, 5), 2, simplify=simplify)
            assert torch.equal(columns, functional.unfold(x, 2))
            torch.testing.assert_close(image, functional.fold(columns, (5, 5), 2))


@SIMPLIFY
@DIRECTION
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 4}], ids=str)
def test_meta_tensors_and_empty_batches(
    device: str, batch: int, ndim: int, transposed: bool, simplify: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 4, *[6] * ndim, dtype=torch.float64, device=device)
    shape = 4, 4 // options.get("groups", 1), *[3] * ndim
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_(), weight.requires_grad_(), weight.new_ones(4).requires_grad_()]
    results = []
    for function in pair(ndim, transposed, simplify):
        y = function(*leaves, **options)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), leaves)))
    for ours, torchs in zip(*results):
        if device == "meta":
            assert (ours.shape, ours.device, ours.dtype) == (
                torchs.shape, torchs.device, torchs.dtype,
            )  # fmt: skip
        else:
            torch.testing.assert_close(ours, torchs)


@SIMPLIFY
def test_empty_batch_in_four_dimensions(simplify: bool) -> None:
    x = torch.zeros(0, 2, 3, 3, 3, 3, requires_grad=True)
    weight = torch.ones(5, 2, 2, 2, 2, 2, requires_grad=True)
    y = convNd(x, weight, simplify=simplify)
    gradients = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (0, 5, 2, 2, 2, 2)
    assert gradients[0].shape == x.shape
    assert torch.equal(gradients[1], torch.zeros_like(weight))


@SIMPLIFY
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch", [0, 2])
def test_unfolds_of_meta_tensors_and_empty_batches(device: str, batch: int, simplify: bool) -> None:
    x = torch.ones(batch, 3, 6, 6, device=device, requires_grad=True)
    columns = unfoldNd(x, 2, simplify=simplify)
    assert columns.shape == functional.unfold(x, 2).shape
    assert torch.autograd.grad(columns.sum(), x)[0].shape == x.shape
    z = columns.detach().requires_grad_()
    image = foldNd(z, (6, 6), 2, simplify=simplify)
    assert image.shape == x.shape
    assert torch.autograd.grad(image.sum(), z)[0].shape == z.shape
    transposed = unfoldNd_transpose(x, 2, simplify=simplify)
    assert transposed.shape == (batch, 12, 49)
    assert torch.autograd.grad(transposed.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("layer", [ConvNd(2, 3, 4, 3), ConvTransposeNd(2, 3, 4, 3)])
def test_layers_on_meta_tensors_and_empty_batches(layer: torch.nn.Module) -> None:
    assert layer.to("meta")(torch.rand(2, 3, 6, 6, device="meta")).is_meta
    layer = layer.to_empty(device="cpu")
    layer(torch.rand(0, 3, 6, 6)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@SIMPLIFY
def test_inference_mode(simplify: bool) -> None:
    x, weight = torch.rand(2, 3, 6, 6), torch.rand(4, 3, 3, 3)
    with torch.inference_mode():
        y = convNd(x, weight, simplify=simplify)
        columns = unfoldNd(x + 0, 2, simplify=simplify)
    assert y.is_inference()
    torch.testing.assert_close(y.clone(), functional.conv2d(x, weight))
    torch.testing.assert_close(columns.clone(), functional.unfold(x, 2))
    weight.requires_grad_()
    convNd(x, weight, simplify=simplify).sum().backward()  # nothing of inference mode is left


@pytest.fixture
def default_device() -> Iterator[None]:
    """New tensors are on the meta device, so that a tensor made without a device is found out."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@SIMPLIFY
@pytest.mark.usefixtures("default_device")
def test_default_device(simplify: bool) -> None:
    x = torch.arange(72.0, device="cpu").reshape(1, 2, 6, 6)
    weight = torch.ones(2, 2, 3, 3, device="cpu")
    options = {"simplify": simplify}
    results = [
        (convNd(x, weight, padding="same", **options), functional.conv2d(x, weight, padding=1)),
        (conv_transposeNd(x, weight, **options), functional.conv_transpose2d(x, weight)),
        (unfoldNd(x, 2, **options), functional.unfold(x, 2)),
        (foldNd(x.view(1, 8, 9), (4, 4), 2, **options), functional.fold(x.view(1, 8, 9), 4, 2)),
    ]
    for ours, torchs in results:
        torch.testing.assert_close(ours, torchs)
    assert ConvNd(2, 2, 2, 3).weight.is_meta
    for mode in ("reflect", "replicate", "circular"):
        layer = torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode, device="cpu")
        torch.testing.assert_close(ConvNd.from_nn_Conv(layer, simplify)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated", "ignore:Dynamo detected")
def test_forward_mode_of_compiled_functions() -> None:
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    weight = torch.rand(4, 3, 3, 3, dtype=torch.float64)
    expected = functional.conv2d(x.sin(), weight)
    torch._dynamo.reset()
    compiled = torch.compile(convNd, backend="aot_eager")
    compiled(x, weight)
    with forward_ad.dual_level():
        dual = compiled(forward_ad.make_dual(x, x.sin()), weight)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: convNd(x, weight), (x,), (x.sin(),))[1]

    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x), expected)
