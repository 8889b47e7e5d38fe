"""What a positive part was taken of, where the graph does not keep it."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e3
"""Rounding errors, in units of the largest entry, up to which tensors are the same."""


def before_positive_part(result: Tensor, unshifted: Tensor) -> Tensor:
    """Return a tensor with the same positive part, which is the right one where that is positive.

    A constant that was added, as in ``relu(1 - x)``, is not in the graph. It follows from the
    positive entries, if it is the same number in all of them and explains the others. Otherwise
    entries without a positive part stay without one, as if a mask had selected the others: they
    are minus infinity.

    Args:
        result: The positive part.
        unshifted: What it was taken of, up to constants that were added.
    """
    inside = result > 0
    selected = result.where(inside, -torch.inf)
    if int(inside.sum()) < 2:
        return selected
    shifts = (result - unshifted)[inside]
    shift = shifts.double().mean().to(result.dtype)
    shifted = unshifted + shift
    bound = _rounding(result, unshifted, shift)
    if bool((shifts - shift).abs().max() > bound) or bool((shifted[~inside] > bound).any()):
        return selected
    return result.where(inside, shifted.clamp(max=0))


def follows(result: Tensor, before: Tensor) -> bool:
    """Return whether a positive part is that of a tensor, up to rounding.

    Args:
        result: The positive part.
        before: The tensor, computed with a shift that may be that of another layer.
    """
    bound = _rounding(before)
    return before.shape == result.shape and bool(((before.relu() - result).abs() <= bound).all())


def _rounding(*tensors: Tensor) -> float:
    """Return the rounding error of sums of tensors."""
    largest = max((float(own.abs().max()) for own in tensors if own.numel()), default=0.0)
    return ROUNDING * torch.finfo(tensors[0].dtype).eps * largest
