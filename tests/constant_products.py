"""Layers that multiply their weight by a constant, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def mask_like(weight: Tensor, seed: int = 0) -> Tensor:
    """Return a mask that hides a third of the entries."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(weight.shape, generator=generator) > 1 / 3).to(weight)


class MaskedLinear(nn.Linear):
    """As in autoregressive networks (Germain et al., 2015)."""

    mask: Tensor

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", mask_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.mask * self.weight, self.bias)


class MaskedConv(nn.Conv2d):
    """A convolution with a mask."""

    mask: Tensor

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("mask", mask_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class PixelConv(MaskedConv):
    """A convolution that masks its weight in place (van den Oord et al., 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return self._conv_forward(x, self.weight, self.bias)


class ScaledLinear(nn.Module):
    """A linear layer with an equalised learning rate (Karras et al., 2018)."""

    def __init__(
        self, inputs: int, outputs: int, scale: float = 0.4, bias_scale: float = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.bias_scale = scale, bias_scale

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * self.bias_scale
        return functional.linear(x, self.weight * self.scale, bias=bias)


class ScaledConv(nn.Module):
    """A convolution with an equalised learning rate, which pads by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3))
        self.scale = torch.linspace(0.5, 2, outputs)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (2, 1))
        weight = self.weight * self.scale.to(x) / 3
        return functional.conv1d(x, weight, None, 2, 1)
