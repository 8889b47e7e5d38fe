"""The networks of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import pad


def small_cnn(size: int, widths: tuple[int, int], hidden: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each max-pooled, and two linear layers."""
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (size // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def plain_cnn(width: int, depth: int = 20) -> nn.Sequential:
    """Return ``depth`` layers without normalisation or shortcuts, with the weights of He et al.

    A 3x3 convolution of stride 2, more 3x3 convolutions, the middle one with stride 2 and twice
    the channels, an average over positions, and a linear layer.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()]
    middle = depth // 2
    channels = [width] * middle + [2 * width] * (depth - 1 - middle)
    for inputs, outputs in pairwise(channels):
        stride = 2 if outputs > inputs else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(2 * width, 10))
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return model


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut without parameters.

    With a stride, the shortcut takes every second position and pads the channels with zeros (He et
    al., 2016).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = outputs - inputs
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, outputs, h/stride, w/stride]``."""
        shortcut = x[..., :: self.stride, :: self.stride]
        shortcut = pad(shortcut, (0, 0, 0, 0, 0, self.added))
        out: Tensor = self.activation(self.path(x) + shortcut)
        return out


def resnet20(width: int, blocks: int = 3) -> nn.Sequential:
    """Return ResNet-20 (He et al., 2016) for one channel; the original has width 16."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for inputs, outputs in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        stride = 2 if outputs > inputs else 1
        layers.append(ResidualBlock(inputs, outputs, stride))
        layers += [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*layers, *head)


def conv_autoencoder(size: int, width: int, code: int) -> nn.Sequential:
    """Return strided convolutions to ``code`` numbers, and transposed convolutions back."""
    small = size // 4
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * small**2, code),
        nn.Linear(code, 2 * width * small**2),
        nn.ReLU(),
        nn.Unflatten(1, (2 * width, small, small)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


def deep_autoencoder(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers along ``sizes`` and back, the code linear.

    It has rectified linear units, unlike the logistic ones of Hinton and Salakhutdinov (2006).
    """
    path = [*sizes, *reversed(sizes[:-1])]
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (inputs, outputs) in enumerate(pairwise(path), start=1):
        layers.append(nn.Linear(inputs, outputs))
        if index not in (len(sizes) - 1, len(path) - 1):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
