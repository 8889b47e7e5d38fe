"""ResNet-50 and ViT-B/16 at any width, for the benchmark of communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.short: nn.Module = nn.Identity()
        if inputs != outputs:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return torch.relu(self.body(x) + self.short(x))


def resnet50(width: int, classes: int) -> nn.Module:
    """Return ResNet-50, of width 64, or a narrower one."""
    stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks, inputs = [], width
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            stride = 2 if stage and not index else 1
            blocks.append(Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


class Attention(nn.Module):
    """Self-attention with a layer for each of queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of 12 heads."""
        parts = (own(x).unflatten(-1, (12, -1)).transpose(1, 2) for own in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(*parts)
        result: Tensor = self.out(found.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """The block of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.body = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        x = x + self.attention(self.first(x))
        result: Tensor = x + self.body(self.second(x))
        return result


class ViT(nn.Module):
    """ViT-B/16, of width 768, or a narrower one."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        found = self.blocks(self.patches(x).flatten(2).mT)
        scores: Tensor = self.head(self.norm(found.mean(1)))
        return scores


@dataclass(frozen=True)
class Subject:
    """A network in two widths.

    Args:
        model: Makes it from its width and number of classes.
        widths: The full width, and that of the recorded one.
    """

    model: Callable[[int, int], nn.Module]
    widths: tuple[int, int]

    def made(self, *, full: bool) -> nn.Module:
        """Return the network; the full one without memory."""
        if not full:
            return self.model(self.widths[1], 10)
        with torch.device("meta"):
            return self.model(self.widths[0], 1000)


SUBJECTS = {"ResNet-50": Subject(resnet50, (64, 8)), "ViT-B/16": Subject(ViT, (768, 48))}
