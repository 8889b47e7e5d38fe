"""Normalisations of images that are stored channels last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim_cases import train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ChannelNorm(nn.Module):
    """Layer normalisation over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class FunctionalNorm(nn.Module):
    """Group normalisation that is no module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, 2, self.weight)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda n: nn.GroupNorm(2, 8),
    "group without parameters": lambda n: nn.GroupNorm(4, 8, affine=False),
    "functional": lambda n: FunctionalNorm(),
    "instance": lambda n: INSTANCE_NORMS[n](8, affine=True),
    "batch": lambda n: BATCH_NORMS[n](8),
    "layer": lambda n: ChannelNorm(),
}


def trained(norm: str, dimension: int, layout: str) -> Tensor:
    """Return the weights after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        CONVOLUTIONS[dimension](3, 8, 3, padding=1),
        NORMS[norm](dimension),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3**dimension, 2),
    ).double()
    x, y = torch.randn(8, 3, *[3] * dimension).double(), torch.randint(2, (8,))
    if layout != "contiguous":
        x = x.to(memory_format=LAYOUTS[dimension])
    if layout == "channels last":
        model = model.to(memory_format=LAYOUTS[dimension])
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for _ in range(2):
        train_step(model, loss_fn, opt, (x, y))
    return weights(model)


IN_TURN = [
    (norm, dimension, ("inputs", "channels last")[(index + dimension) % 2])
    for index, norm in enumerate(NORMS)
    for dimension in LAYOUTS
]
"""Each normalisation in both dimensions, and in each of them in one of the two layouts."""


@pytest.mark.parametrize(("norm", "dimension", "layout"), IN_TURN)
def test_the_layout_of_images_changes_nothing(norm: str, dimension: int, layout: str) -> None:
    expected, found = (trained(norm, dimension, own) for own in ("contiguous", layout))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
