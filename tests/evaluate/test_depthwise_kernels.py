"""Convolutions with many groups of one channel, against torch's, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from einconv_kfac.evaluate import contract_convolution
from einconv_kfac.evaluate.kernels import depthwise, innermost, selection
from einconv_kfac.geometry import conv_geometry

CASES: list[dict[str, Any]] = [
    {"input_size": (9,), "kernel_size": 3},
    {"input_size": (7,), "kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2},
    {"input_size": (6, 5), "kernel_size": (3, 5), "padding": (1, 2)},
    {"input_size": (8, 7), "kernel_size": 3, "stride": (2, 1), "padding": 1},
    {"input_size": (2, 3), "kernel_size": 7, "padding": 3},  # entries that meet no input
    {"input_size": (1, 2), "kernel_size": 1, "stride": 2, "padding": 2},
    {"input_size": (4, 3, 5), "kernel_size": 3, "stride": (1, 2, 1), "padding": 1},
]


@pytest.mark.parametrize("layout", [selection.INNERMOST, selection.DEPTHWISE])
@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_layouts_agree_with_torch(
    case: dict[str, Any], chunk: int, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(innermost, "INNERMOST_CHUNK_BYTES", chunk)
    monkeypatch.setattr(depthwise, "GRID_BYTES_PER_THREAD", chunk)
    torch.manual_seed(0)
    channels = 40
    geometry = conv_geometry(**case, groups=channels)
    x = torch.randn(3, channels, *geometry.input_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, *geometry.kernel_size, dtype=x.dtype, requires_grad=True)
    convolve: Any = (torch.conv1d, torch.conv2d, torch.conv3d)[geometry.ndim - 1]
    padding = [left for left, _ in geometry.padding]
    options = (geometry.stride, padding, geometry.dilation, channels)
    expected = convolve(x, weight, None, *options)
    v = torch.randn_like(expected)
    d_x, d_weight = torch.autograd.grad(expected, (x, weight), v)
    pairs = {"v": (x, weight), "x": (weight, v), "w": (x, v)}
    for role, value in {"v": expected, "x": d_x, "w": d_weight}.items():
        first, second = (t.detach() for t in pairs[role])
        torch.testing.assert_close(layout[role](geometry, first, second), value.detach())
        torch.testing.assert_close(
            contract_convolution(geometry, role, first, second), value.detach()
        )


def test_layout_is_chosen_from_sizes() -> None:
    def chosen(size: int, channels: int, outputs: int) -> Any:
        geometry = conv_geometry((size, size), 3, groups=channels)
        weight = torch.empty(outputs, 1, 3, 3)
        x = torch.empty(1, channels, size, size)
        return selection.contraction(geometry, "v", x, weight)

    assert chosen(9, 64, 64) is innermost.forward
    assert chosen(64, 64, 64) is depthwise.forward
    assert chosen(9, 8, 8) is depthwise.forward
    assert chosen(9, 64, 128) is depthwise.forward
