"""ResNet-50 (He et al., 2016), of torch's modules alone."""

from __future__ import annotations

from torch import Tensor, nn

RESNET50_BLOCKS = (3, 4, 6, 3)
"""Number of blocks of each stage."""
EXPANSION = 4
"""Channels of a block's output by those of its 3x3 convolution."""


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with batch normalisation, and a shortcut.

    Args:
        inputs: Channels of the input.
        width: Channels between the convolutions.
        stride: Stride of the 3x3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and shortcut, rectified."""
        result: Tensor = self.activation(self.branch(x) + self.shortcut(x))
        return result


def bottleneck_resnet(
    blocks: tuple[int, ...] = RESNET50_BLOCKS, width: int = 64, classes: int = 1000
) -> nn.Sequential:
    """Return a residual network for images of three channels, ResNet-50 by default.

    Args:
        blocks: Number of blocks of each stage; the stages after the first halve the resolution.
        width: Channels of the stem and between the convolutions of the first stage.
        classes: Number of classes.
    """
    model = nn.Sequential(
        nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    )
    inputs = width
    for stage, count in enumerate(blocks):
        own = width * 2**stage
        for block in range(count):
            model.append(Bottleneck(inputs, own, 2 if stage and not block else 1))
            inputs = EXPANSION * own
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)])
