"""Scripts whose losses differ between workers, and the same with one worker that accumulates."""

from __future__ import annotations

from typing import Any

import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac import KFAC

SIZE, STEPS = 2, 3
FIXED = {"lr": 0.05, "adaptive": False}
MODES: dict[str, dict[str, Any]] = {
    "automatic": {"fisher": "exact"},
    "fixed": {**FIXED, "fisher": "exact"},
    "sampled": {**FIXED, "mc_samples": 2},
    "forward-only": {**FIXED, "fisher": "forward-only"},
    "divided factors": {"fisher": "exact", "divide_factors": True},
}
WEIGHTS = {
    "zero on the first": (0.0, 1.0),
    "zero on the last": (1.0, 0.0),
    "small on one": (0.25, 1.0),
    "negative on all": (-1.0, -0.5),
    "both signs": (1.0, -0.5),
}
"""The weights of the losses of both workers in the second step; those of others are 1."""


def trained(weights_then: tuple[float, ...], rank: int, size: int, **options: Any) -> Tensor | str:
    """The parameters after each step, or the text of an error.

    Args:
        weights_then: The weights of both workers in the second step.
        rank: The worker's number.
        size: The number of workers; one has the batches of both.
        options: Of the optimizer, and ``reduction`` of the loss.
    """
    module = conv_net()
    loss_fn = nn.CrossEntropyLoss(reduction=options.pop("reduction", "mean"))
    model = module if size == 1 else DistributedDataParallel(module)
    opt, found = KFAC(model, loss_fn, factor_update_period=1, **options), []
    for number in range(STEPS):
        opt.zero_grad()
        for own in range(SIZE) if size == 1 else [rank]:
            x, y = image_batch(8, 10 * number + own)
            weight = weights_then[own] if number == 1 else 1.0
            (loss_fn(model(x), y) * weight * (size / SIZE)).backward()
        try:
            opt.step()
        except RuntimeError as error:
            return str(error)
        found.append(weights(module))
    return torch.stack(found)


def results(rank: int, size: int) -> dict[str, Tensor | str]:
    """What each worker found, by weights, mode and reduction."""
    return {
        f"{name}, {mode}, {reduction}": trained(own, rank, size, **options, reduction=reduction)
        for name, own in WEIGHTS.items()
        for mode, options in MODES.items()
        for reduction in ("mean", "sum")
        if reduction == "mean" or mode == "fixed"
    }
