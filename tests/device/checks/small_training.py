"""A small convolutional network and its training, with values on either device."""

from __future__ import annotations

from typing import Any

import torch
from simulated_device import held
from torch import Tensor, nn

from einconv_kfac import KFAC

CLASSES = 3
"""Few, since an exact Fisher has a backward pass for each."""
EXAMPLES = 40
"""More than a factor has rows, so that no basis of a null space is left to rounding."""


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)),
    ]
    return nn.Sequential(*layers).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(EXAMPLES, 3, 8, 8, generator=generator, dtype=dtype),
            torch.randint(CLASSES, (EXAMPLES,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model: nn.Module, opt: Any, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in data:
        opt.zero_grad()
        loss = opt.loss_fn(model(x), y)  # type: ignore[attr-defined]
        loss.backward()
        opt.step()
        losses.append(float(held(loss.detach())))
    return losses


def optimizer(model: nn.Module, **options: Any) -> KFAC:
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    opt.loss_fn = loss_fn  # type: ignore[attr-defined]
    return opt
