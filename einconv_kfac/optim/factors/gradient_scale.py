"""The factor of a gradient scaler in the weights of losses, where the scaler does not say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import sum_of

LARGEST_WEIGHT = 1024.0
"""Total weight of the losses of a step above which they are taken to be scaled."""
ROUNDING = 1e-6
"""Largest distance of a binary logarithm from an integer."""


def scale_of(factor: Tensor | None) -> Tensor | None:
    """Return the scale by which gradients were divided since the backward pass, or ``None``.

    Scales of `torch.amp.GradScaler` are powers of two; other factors are those of clipping.

    Args:
        factor: By how much the gradients were multiplied; ``None`` if they were not.
    """
    if factor is None:
        return None
    power = math.log2(float(factor))
    if power > -0.5 or abs(power - round(power)) > ROUNDING:
        return None
    return factor.reciprocal()


def without_scale(batches: Sequence[Batch], scale: Tensor | None) -> list[Batch]:
    """Return batches whose weights are divided by a scale, if there is one."""
    if scale is None:
        return list(batches)
    return [replace(batch, weight=batch.weight / scale.to(batch.weight)) for batch in batches]


def check_unscaled(batches: Sequence[Batch]) -> None:
    """Raise a ``RuntimeError`` if the weights of losses are those of a gradient scaler."""
    weights = [batch.weight.abs() for batch in batches if batch.layers]
    total = float(sum_of(weights)) if weights else 0.0
    if total >= LARGEST_WEIGHT:
        raise RuntimeError(
            f"The weights of the losses of a step must add up to less than {LARGEST_WEIGHT:g}, got "
            f"{total:g}, as with a gradient scaler, which is no part of the curvature. Call "
            "`scaler.unscale_(optimizer)` before `step` of the preconditioner, or pass the loss "
            "with its factor to `observe` before `loss.backward()`."
        )
