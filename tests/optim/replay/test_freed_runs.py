"""Tensors of replays are freed by reference counts, not when garbage is collected."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from einconv_kfac import KFAC


class Watched(nn.Module):
    """An activation that knows its outputs, as long as they exist."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        self.outputs.append(weakref.ref(y))
        return y


def test_a_step_leaves_no_activations_behind() -> None:
    torch.manual_seed(0)
    watched, loss_fn = Watched(), nn.MSELoss()
    model = nn.Sequential(nn.Linear(4, 5), watched, nn.Linear(5, 2))
    opt, x, y = KFAC(model, loss_fn), torch.randn(6, 4), torch.randn(6, 2)
    gc.disable()
    try:
        for _ in range(2):
            opt.zero_grad()
            loss_fn(model(x), y).backward()
            opt.step()
        left = [own for own in watched.outputs if own() is not None]
    finally:
        gc.enable()
    assert len(watched.outputs) > 4  # of passes and replays
    assert not left
