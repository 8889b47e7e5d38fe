"""The factor of a gradient scaler in the weights of losses, where the scaler does not say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import sum_of

LARGEST_WEIGHT = 1024.0
"""Total weight of the losses of a step from which on they are taken to be scaled."""
ROUNDING = 1e-6
"""Largest distance of a binary logarithm from an integer, and of a squared cosine from 1."""


def unscaled(batches: Sequence[Batch], products: Tensor | None) -> tuple[list[Batch], float]:
    """Return batches with the weights that their losses have in the present gradients.

    Scales of `torch.amp.GradScaler` are powers of two. Other factors of gradients are those of
    clipping, and leave the objective as it is. The host reads four numbers.

    Args:
        batches: The batches of a step.
        products: See `GradientWatch.products`.

    Returns:
        The batches, and the scale that their weights were divided by.

    Raises:
        RuntimeError: If the weights are still those of a gradient scaler.
    """
    weights = [batch.weight.abs() for batch in batches if batch.layers]
    if not weights:
        return list(batches), 1.0
    total = sum_of(weights).double().reshape(1)
    known = total if products is None else torch.cat([total, products.to(total)])
    size, *own = known.tolist()
    scale = _scale(*own) if own else 1.0
    if size / scale >= LARGEST_WEIGHT:
        raise RuntimeError(
            f"The weights of the losses of a step must add up to less than {LARGEST_WEIGHT:g}, got "
            f"{size / scale:g}, as with a gradient scaler, which is no part of the curvature. Call "
            "`scaler.unscale_(optimizer)` before `step` of the preconditioner, or pass the loss "
            "with its factor to `observe` before `loss.backward()`."
        )
    if scale == 1:
        return list(batches), scale
    return [replace(batch, weight=batch.weight / scale) for batch in batches], scale


def _scale(before: float, product: float, present: float) -> float:
    """Return the power of two above 1 that gradients were divided by, or 1."""
    if not (before > 0 and product > 0 and present > 0):
        return 1.0
    power = math.log2(before / product)
    is_parallel = abs(product**2 / (before * present) - 1) <= ROUNDING
    is_power = power > 0.5 and abs(power - round(power)) <= ROUNDING
    return 2.0 ** round(power) if is_parallel and is_power else 1.0
