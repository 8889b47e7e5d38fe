"""What the scripts of docs/scripts.md share, and their table by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

STEPS = 6
Script = Callable[[], list[float]]
SCRIPTS: dict[str, Script] = {}


def script(row: str) -> Callable[[Script], Script]:
    """Register the script of a row."""

    def register(run: Script) -> Script:
        SCRIPTS[row] = run
        return run

    return register


def data(size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def steps(opt: KFAC, loss: Callable[[], Tensor], count: int = STEPS) -> list[float]:
    losses = []
    for _ in range(count):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        losses.append(float(value.detach()))
    return losses
