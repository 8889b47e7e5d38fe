"""Gradients that a scaler has unscaled before the step, whatever the weights of the losses are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from einconv_kfac import KFAC

MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
LOSSES: dict[str, dict[str, Any]] = {
    "observed parts": {"inside": 1 / 3},
    "divided afterwards": {"outside": 1 / 3},
    "a weight": {"inside": 0.2, "outside": 0.6},
    "sums": {"inside": 0.01, "reduction": "sum"},
}


class OtherScaler(torch.amp.GradScaler):
    """A subclass that wraps the step."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        return super().step(optimizer, *args, **kwargs)


def trained(
    options: dict[str, Any],
    scaler: torch.amp.GradScaler,
    bound: float | None,
    inside: float = 1.0,
    outside: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Train on three micro-batches per step, with gradients unscaled and clipped before it."""
    model = conv_net()
    opt = KFAC(model, fisher="exact", **options)
    for seed in range(3):
        x, y = image_batch(seed=seed)
        opt.zero_grad()
        for rows in torch.arange(12).chunk(3):
            loss = cross_entropy(model(x[rows]), y[rows], reduction=reduction)
            scaler.scale(opt.observe(inside * loss) * outside).backward()
        scaler.unscale_(opt)
        if bound is not None:
            clip_grad_norm_(model.parameters(), bound)
        scaler.step(opt)
        scaler.update()
    return weights(model)


SCALERS = (torch.amp.GradScaler, 2.0**10), (OtherScaler, 37.0)
IN_TURN = [
    (options, (None, 0.05)[(i + j) % 2], losses, *SCALERS[(i + j // 2) % 2])
    for i, options in enumerate(MODES)
    for j, losses in enumerate(LOSSES)
]
"""Each mode with all losses; clipped in turn, and with scalers of each kind in turn."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("options", "bound", "losses", "kind", "scale"), IN_TURN)
def test_the_factor_is_that_of_the_scaler(
    options: dict[str, Any], bound: float | None, losses: str, kind: Any, scale: float
) -> None:
    own, disabled = LOSSES[losses], torch.amp.GradScaler("cpu", enabled=False)
    plain = trained(options, disabled, bound, **own)
    found = trained(options, kind("cpu", init_scale=scale, growth_interval=2), bound, **own)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-8)
