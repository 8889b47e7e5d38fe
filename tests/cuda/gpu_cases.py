"""The device of these tests, and a small network with its training.

They are for a GPU and skipped without one. ``EK_DEVICE=cpu`` runs what needs none of CUDA's own
tools on the processor, so that the tests themselves can be tried.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

DEVICE = torch.device(os.environ.get("EK_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
CPU = torch.device("cpu")
NEEDS_DEVICE = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="needs a GPU; EK_DEVICE=cpu runs without"
)
NEEDS_GPU = pytest.mark.skipif(
    not (ON_GPU and torch.cuda.is_available()), reason="is about a GPU alone"
)
Batches = Sequence[tuple[Tensor, Tensor]]


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)),
    ]
    return nn.Sequential(*layers).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 3, 8, 8, generator=generator, dtype=dtype),
            torch.randint(10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def optimizer(model: nn.Module, **options: Any) -> tuple[nn.Module, KFAC]:
    loss_fn = nn.CrossEntropyLoss()
    return loss_fn, KFAC(model, loss_fn, **options)


def train(
    model: nn.Module, loss_fn: nn.Module, opt: Any, data: Batches, device: torch.device
) -> Tensor:
    """The losses of the steps, on the processor."""
    losses = []
    for x, y in data:
        opt.zero_grad()
        loss = loss_fn(model(x.to(device)), y.to(device))
        loss.backward()
        opt.step()
        losses.append(loss.detach().cpu())
    return torch.stack(losses)
