"""A photograph as a function of its coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from math import log10, pi
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from evidence.data import Sources
from evidence.examples import Examples, Split
from evidence.task import Family, chunks


class NeuralField(nn.Module):
    """Colours from sines and cosines of coordinates (Tancik et al., 2020).

    Args:
        waves: Number of random frequencies.
        width: Units of each of the two hidden layers.
        spread: Standard deviation of the frequencies.
    """

    frequencies: Tensor

    def __init__(self, waves: int = 64, width: int = 128, spread: float = 4.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", spread * torch.randn(2, waves))
        hidden = nn.Linear(2 * waves, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.network = nn.Sequential(*hidden, nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return colours ``[n, 3]`` for coordinates ``[n, 2]`` between 0 and 1."""
        phase = 2 * pi * x @ self.frequencies
        colours: Tensor = self.network(torch.cat([phase.sin(), phase.cos()], 1))
        return colours


@dataclass(frozen=True)
class Photograph(Family):
    """A picture of scikit-learn, every second pixel; the test is the others' signal-to-noise ratio.

    Args:
        factor: Height and width are those of the picture, 427x640, divided by it.
    """

    factor: int = 4
    metric: ClassVar[str] = "PSNR dB"
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {
        "SGD": (1e-2, 3.0),
        "AdamW": (4.37e-3, 0.175),
    }

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"photograph of {427 // self.factor}x{640 // self.factor}"

    def data(self, sources: Sources) -> Split:
        """See `Family`; the pixels are shuffled."""
        pixels = import_module("sklearn.datasets").load_sample_image("china.jpg").copy()
        image = avg_pool2d(torch.from_numpy(pixels).movedim(2, 0).float() / 255, self.factor)
        rows, columns = (torch.linspace(0, 1, size) for size in image.shape[1:])
        x, y = torch.cartesian_prod(rows, columns), image.flatten(1).T
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, rest = order[::2], order[1::2]
        return Split(Examples(x[train], y[train]), Examples(x[rest], y[rest]))

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.MSELoss()

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        total = sum(float((model(x) - y).square().sum()) for x, y in chunks(examples))
        return -10 * log10(total / examples.y.numel())
