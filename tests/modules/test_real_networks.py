"""Conversion of a residual network and of a U-Net."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.modules import ConvNd, ConvTransposeNd, convert


class Block(nn.Module):
    """Pointwise, strided and dilated grouped, pointwise; with a shortcut."""

    def __init__(self, channels: int, out: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 8, 1, bias=False)
        options = {"stride": stride, "dilation": dilation, "padding": dilation, "groups": 4}
        self.mix = nn.Conv2d(8, 8, 3, **options, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, out, 1)
        self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu_(self.norm(self.mix(self.reduce(x))))
        return functional.relu(self.expand(inner) + self.shortcut(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, "valid")
        self.blocks = nn.Sequential(Block(8, 16, 2, 1), Block(16, 16, 1, 2))
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16, padding_mode="reflect")
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.blocks(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)])
        self.bottom = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(12, 12, 2, 2),
                nn.ConvTranspose2d(24, 6, 3, 2, padding=1, output_padding=1, groups=6),
            ]
        )
        self.out = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            kept.append(functional.relu(layer(x)))
            x = functional.max_pool2d(kept[-1], 2)
        x = functional.relu(self.bottom(x))
        for layer in self.up:
            x = torch.cat([functional.relu(layer(x)), kept.pop()], 1)
        return self.out(x).mean((2, 3))


@pytest.fixture(params=[Residual, UNet])
def networks(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A network, and a converted copy."""
    torch.manual_seed(0)
    original: nn.Module = request.param().double()
    return original, convert(copy.deepcopy(original))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    return lambda: functional.cross_entropy(model(x), y)


def test_conversion_keeps_outputs_gradients_and_names(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    original, converted = networks
    kinds = [type(m) for m in converted.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert kinds
    assert set(kinds) <= {ConvNd, ConvTransposeNd}
    torch.manual_seed(1)
    inputs = [torch.randn(4, 3, 16, 16, dtype=torch.float64)] * 2
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = [model(x) for model, x in zip(networks, inputs)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.sin().sum().backward()
    torch.testing.assert_close(*(x.grad for x in inputs))
    for ours, torchs in zip(converted.parameters(), original.parameters()):
        torch.testing.assert_close(ours.grad, torchs.grad)


def test_converted_network_loads_the_originals_state(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    original, converted = networks
    torch.manual_seed(1)
    for parameter in converted.parameters():
        nn.init.normal_(parameter)
    state = original.state_dict()
    assert list(converted.state_dict()) == list(state)
    converted.load_state_dict(state)
    torch.testing.assert_close(*(loss_of(model)() for model in networks))
    original.load_state_dict(converted.state_dict())


def test_converted_network_trains_as_the_original(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    curves = []
    for model in networks:
        loss_function = loss_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_function()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(*curves)
    assert curves[0][-1] < curves[0][0]


def test_converted_network_compiles(networks: tuple[nn.Module, nn.Module]) -> None:
    torch._dynamo.reset()
    converted = networks[1].eval()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    outputs = [model(x) for model in (compiled, converted)]
    torch.testing.assert_close(*outputs)
    parameters = list(converted.parameters())
    gradients = [torch.autograd.grad(y.sin().sum(), parameters) for y in outputs]
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()
