"""The factor of a gradient scaler in the weights of losses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from einconv_kfac.distributed.workers import ALONE, Workers
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import sum_of


def scaler_factor(
    batches: Sequence[Batch], scale: Tensor | None, sums: bool, workers: Workers = ALONE
) -> Tensor:
    """Return the factor of a gradient scaler in the weights of batches.

    Args:
        batches: The batches, at least one.
        scale: The factor, or ``None`` if the gradients were unscaled before the step. It is then
            that of the scaler that calls the step. The objective of another class of scalers is
            taken to be the mean or the sum of the recorded losses.
        sums: Whether the losses are sums over examples, not means.
        workers: The workers, each with batches of its own.
    """
    if scale is None:
        scale = _scale_of_caller()
    if scale is not None:
        return scale
    own = [sum_of([batch.weight for batch in batches]), len(batches)]
    total, count = workers.means(own, "factor of the scaler")
    return cast("Tensor", total / count if sums else total)


def _scale_of_caller() -> Tensor | None:
    """Return the scale of the `torch.amp.GradScaler` in whose ``step`` this is called.

    A scaler whose ``unscale_`` was called does not pass it to the optimizer, and gradients that
    were clipped afterwards do not show it.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler._get_scale_async()
    return None
