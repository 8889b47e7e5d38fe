"""Convolutions in graphs: compiled, transformed, traced and counted, against torch's own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import CONVOLUTIONS, TRANSPOSED
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac.evaluate.operator import convolution, flattened
from einconv_kfac.functionals import conv_transposeNd, convNd, unfoldNd, unfoldNd_transpose
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.modules import ConvNd, ConvTransposeNd, FoldNd, UnfoldNd, convert

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),  # torch's own: deprecated
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch, in 4d
    pytest.mark.usefixtures("fresh_dynamo"),
]
Function = Callable[..., Any]
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
OPTIONS = [{"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}]
CASES = pytest.mark.parametrize("options", OPTIONS, ids=str)
DIRECTION = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(ndim: int, options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *[6] * ndim, dtype=dtype)
    return x, torch.randn(4, 4 // options.get("groups", 1), *[3] * ndim, dtype=dtype)


def close(ours: Any, torchs: Any) -> None:
    pairs = zip(*(torch.utils._pytree.tree_leaves(found) for found in (ours, torchs)), strict=True)
    for pair in pairs:
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("role", ["v", "x", "w"])
def test_operator_has_the_strides_that_a_compiler_was_promised(
    ndim: int, dtype: torch.dtype, role: str
) -> None:
    torch.manual_seed(0)
    geometry = conv_geometry([6] * ndim, 3, padding=1)
    shapes = {"x": (2, 4, *[6] * ndim), "w": (5, 4, *[3] * ndim), "v": (2, 5, *[6] * ndim)}
    given = [torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if name != role]
    layouts: list[list[Tensor]] = [given]
    if ndim in LAYOUTS:
        last = [t.contiguous(memory_format=LAYOUTS[ndim]) for t in given]
        layouts += [last, [last[0], given[1]], [given[0], last[1]]]
    for pair in layouts:
        for channels_last in (False, True):
            found = convolution(role, flattened(geometry), channels_last, *pair)
            with FakeTensorMode() as mode:
                fake = [mode.from_tensor(tensor) for tensor in pair]
                promised = convolution(role, flattened(geometry), channels_last, *fake)
            assert (found.shape, found.stride()) == (promised.shape, promised.stride())
            expected = convolution(role, flattened(geometry), False, *given)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a compiler")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_default_backend_trains_a_network(last: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2),
    )  # fmt: skip
    layout = torch.channels_last if last else torch.contiguous_format
    original = original.to(memory_format=layout)
    converted = convert(copy.deepcopy(original))
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    results = []
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # compiles a program for each
        for model in (torch.compile(converted, fullgraph=True), original):
            y = model(x)
            results.append((y, torch.autograd.grad(y.sin().sum(), list(model.parameters()))))
    for ours, torchs in zip(*(torch.utils._pytree.tree_leaves(result) for result in results)):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def transforms(function: Function) -> dict[str, Function]:
    one = torch.ones((), dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight).abs().square().sum()

    def gradients(x: Tensor, weight: Tensor) -> Any:
        return torch.func.vjp(norm, x, weight)[1](one)

    def tangents(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.cos() for tensor in tensors)

    return {
        "ensemble": lambda x, w: torch.vmap(function, (None, 0))(x, torch.stack([w, 2 * w])),
        "per-example": lambda x, w: torch.vmap(lambda x: gradients(x[None], w))(x),
        "jvp": lambda *pair: torch.func.jvp(function, pair, tangents(*pair)),
        "hvp": lambda *pair: torch.func.jvp(gradients, pair, tangents(*pair)),
    }


IN_TURN = [
    pytest.param(
        ndim, dtype, OPTIONS[ndim == 2], bool((turn + ndim) % 2), name, id=f"{name}-{ndim}d"
    )
    for turn, name in enumerate(["ensemble", "per-example", "jvp", "hvp"])
    for ndim, dtype in [(1, torch.float64), (2, torch.complex128), (4, torch.float64)]
]
"""Each transform in each dimension, of convolutions and of transposed ones in turn."""


@pytest.mark.parametrize(("ndim", "dtype", "options", "transposed", "name"), IN_TURN)
def test_compiled_transforms(
    ndim: int, dtype: torch.dtype, options: dict[str, Any], transposed: bool, name: str
) -> None:
    ours = conv_transposeNd if transposed else convNd
    torchs = (TRANSPOSED if transposed else CONVOLUTIONS).get(ndim, ours)  # of 4d: not compiled
    pair = operands(ndim, options, dtype)
    transform = transforms(lambda x, w: ours(x, w, **options))[name]
    expected = transforms(lambda x, w: torchs(x, w, **options))[name](*pair)
    close(torch.compile(transform, fullgraph=True, backend="aot_eager")(*pair), expected)


@CASES
@DIRECTION
def test_symbolic_graph_and_count(options: dict[str, Any], transposed: bool) -> None:
    ours = conv_transposeNd if transposed else convNd
    torchs = (TRANSPOSED if transposed else CONVOLUTIONS)[2]
    x, weight = operands(2, options, torch.float64)
    graph = make_fx(lambda x, w: ours(x, w, **options), tracing_mode="symbolic")(x, weight)
    other = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(graph(other, weight), torchs(other, weight, **options))
    counts = []
    for function in (ours, torchs):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with FlopCounterMode(display=False) as counter:
            y = function(*leaves, **options)
            if "groups" not in options:  # torch counts backward passes of groups as of one group
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


class Network(nn.Module):
    """Every padding mode, uneven padding, both directions, and an output size."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("zeros", "reflect", "replicate", "circular")
        options = {"padding": "same", "dtype": torch.float64}
        self.layers = nn.Sequential(
            *(ConvNd(2, 2, 2, (2, 3), padding_mode=mode, **options) for mode in modes),
            ConvNd(2, 2, 4, 3, stride=2, padding=((0, 1), (2, 0)), groups=2, dtype=torch.float64),
            ConvTransposeNd(2, 4, 2, 3, 2, ((1, 0), (0, 1)), 1, dtype=torch.float64),
        )
        self.last = ConvTransposeNd(2, 2, 2, 3, 2, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return self.last(y, output_size=[2 * y.shape[2], 2 * y.shape[3]])


def test_symbolic_trace_and_script_trace() -> None:
    torch.manual_seed(0)
    model = Network()
    x, other = (torch.randn(n, 2, 7, 8, dtype=torch.float64) for n in (2, 3))
    symbolic = torch.fx.symbolic_trace(model)
    wide = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    for graph in (symbolic, copy.deepcopy(symbolic)):
        torch.testing.assert_close(graph(wide), model(wide))
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(other), model(other))
    inner = torch.jit.trace(model.layers, x)
    torch.testing.assert_close(inner(wide), model.layers(wide))
    parameters = list(model.layers.parameters())
    gradients = [torch.autograd.grad(m(wide).sum(), parameters) for m in (inner, model.layers)]
    close(*gradients)


def test_trace_of_one_size_alone_is_refused() -> None:
    for layer, shape in (
        (ConvNd(4, 1, 1, 1), (1, 1, 2, 2, 2, 2)),
        (ConvTransposeNd(4, 1, 1, 1), (1, 1, 2, 2, 2, 2)),
        (UnfoldNd(2), (1, 2, 4, 4)),
    ):
        with pytest.raises(ValueError, match=r"`torch\.export\.export` records it"):
            torch.jit.trace(layer, torch.rand(shape))
        exported = torch.export.export(layer, (torch.rand(shape),)).module()
        x = torch.rand(shape)
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Sequential(*Network().layers, Network().last).float(), (2, 2, 7, 8)),
        (ConvNd(4, 2, 3, 2, padding=1), (2, 2, 3, 4, 3, 3)),
        (ConvTransposeNd(4, 2, 3, 2, 2), (2, 2, 2, 2, 2, 2)),
    ],
)
def test_exports_to_onnx_have_operators_of_torch_alone(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(layer, (x,), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(str(target).startswith("aten.") for target in called)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_folds_are_refused_where_changes_of_views_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match=r"foldNd .*`dynamo=False`"):
        torch.jit.trace(FoldNd(4, 2), torch.rand(1, 2, 3))


def test_script() -> None:
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    model = nn.Sequential(
        *Network().layers[:-1],
        ConvTransposeNd(2, 4, 2, 3, 2, 1, 1, groups=2, **double),
        ConvNd(2, 2, 2, 3, padding=((0, 1), (2, 0)), padding_mode="reflect", **double),
        ConvNd(2, 2, 2, 3, padding="same", simplify=False, **double),
    )
    scripted = torch.jit.script(model)
    for shape in ((3, 2, 9, 11), (2, 7, 8)):
        x = torch.randn(shape, **double)
        torch.testing.assert_close(scripted(x), model(x))
    gradients = [
        torch.autograd.grad(m(x).sum(), list(model.parameters())) for m in (scripted, model)
    ]
    close(*gradients)
    assert {k: v.data_ptr() for k, v in scripted.state_dict().items()} == {
        k: v.data_ptr() for k, v in model.state_dict().items()
    }
    last = ConvTransposeNd(1, 2, 2, 3, 2, **double)
    x = torch.randn(1, 2, 5, **double)
    torch.testing.assert_close(torch.jit.script(last)(x, [12]), last(x, [12]))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (ConvNd(4, 1, 1, 1), "`N` must be 1, 2 or 3 .* ConvNd, got 4"),
        (ConvTransposeNd(1, 1, 1, 2, padding=((0, 1),)), "`padding` must be the same left and"),
        (UnfoldNd(2), "UnfoldNd cannot be compiled"),
        (nn.Sequential(FoldNd(4, 2)), "FoldNd cannot be compiled"),
    ],
)
def test_scripts_without_a_layer_of_torch_are_refused(layer: nn.Module, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*`torch\.export\.export` records it"):
        torch.jit.script(layer)


@pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])
@pytest.mark.parametrize("kernel", [1, 2, 6])
def test_results_own_their_memory(kernel: int, simplify: bool) -> None:
    x = torch.randn(2, 1, 6)
    columns = unfoldNd(x, kernel, simplify=simplify)
    fold = FoldNd(6, kernel, simplify=simplify)
    results = (
        (x, columns),
        (columns, fold(columns)),
        (x, unfoldNd_transpose(x, kernel, padding=kernel // 2, simplify=simplify)),
        (columns, FoldNd(5, kernel, 1, ((1, 0),), simplify=simplify)(columns[..., : 7 - kernel])),
        (x, convNd(x, torch.ones(1, 1, kernel), simplify=simplify)),
    )
    for given, result in results:
        assert result.is_contiguous()
        before = given.clone()
        result.add_(1)
        assert torch.equal(given, before)


LAYERS_WITHOUT_BIAS = [
    lambda dtype: nn.Conv2d(4, 6, 1, bias=False, dtype=dtype),
    lambda dtype: nn.Conv2d(4, 6, 3, padding=1, bias=False, dtype=dtype),
    lambda dtype: nn.Conv2d(4, 4, 3, groups=4, bias=False, dtype=dtype),
    lambda dtype: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=False, dtype=dtype),
    lambda dtype: nn.Conv3d(4, 6, 2, stride=2, bias=False, dtype=dtype),
]


@pytest.mark.parametrize("layer", LAYERS_WITHOUT_BIAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_recorded_results_are_changed_in_place(layer: Any, dtype: torch.dtype, batch: int) -> None:
    torchs = layer(dtype)
    ours = convert(copy.deepcopy(torchs))
    x = torch.randn(batch, 4, *[5] * (torchs.weight.ndim - 2), dtype=dtype)
    for network in (torchs, ours):
        nn.functional.relu_(network(x).mul_(2)).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS_WITHOUT_BIAS)
def test_functionalized_functions(layer: Any) -> None:
    torchs = layer(torch.float64)
    ours = convert(copy.deepcopy(torchs))
    x = torch.randn(2, 4, *[5] * (torchs.weight.ndim - 2), dtype=torch.float64)

    def gradient(network: nn.Module) -> Function:
        return torch.func.grad(lambda x: network(x).relu_().square().sum())

    for transform in (torch.func.functionalize, lambda f: torch.vmap(torch.func.functionalize(f))):
        close(transform(ours)(x), transform(torchs)(x))
    close(torch.func.functionalize(gradient(ours))(x), gradient(torchs)(x))


def test_gradients_recorded_with_symbolic_sizes() -> None:
    x, weight = operands(1, {}, torch.float64)

    def gradient(function: Function) -> Function:
        def loss(weight: Tensor, x: Tensor) -> Tensor:
            return function(x, weight, stride=2, padding=1).square().sum()

        return torch.func.grad(loss)

    recorded = make_fx(gradient(conv_transposeNd), tracing_mode="symbolic")(weight, x)
    close(recorded(weight, x), gradient(nn.functional.conv_transpose1d)(weight, x))
