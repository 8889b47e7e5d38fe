"""The steps of a network applied to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.network.step import Drop, Fold, Insert, Merge, Narrow, Pad, Split, Step, Windows
from einconv_kfac.padding import padded


def _padded(tensor: Tensor, step: Pad) -> Tensor:
    """Add zeros to both ends of one dimension, or remove positions where a number is negative."""
    behind = [(0, 0)] * (tensor.ndim - 1 - step.dim)
    return padded(tensor, [(step.left, step.right), *behind])


def _windowed(tensor: Tensor, step: Windows) -> Tensor:
    """View one dimension as windows."""
    windows = tensor.unfold(step.dim, step.span, step.stride)[..., :: step.dilation]
    return windows.movedim(-1, step.dim + 1)


def _folded(tensor: Tensor, step: Fold) -> Tensor:
    """Sum overlapping windows into one dimension."""
    count, size = tensor.shape[step.dim : step.dim + 2]
    folded = tensor.new_zeros(step.reshape(tensor.shape))
    for entry in range(size):
        target = folded.narrow(step.dim, entry * step.dilation, (count - 1) * step.stride + 1)
        target[_every(step.dim, step.stride)].add_(tensor.select(step.dim + 1, entry))
    return folded


def _every(dim: int, stride: int) -> tuple[slice, ...]:
    """Return the index of every ``stride``-th position of a dimension."""
    return (slice(None),) * dim + (slice(None, None, stride),)


_ACTIONS: dict[type, Callable[[Tensor, Any], Tensor]] = {
    Split: lambda t, s: torch.unflatten(t, s.dim, s.sizes),
    Merge: lambda t, s: t.flatten(s.dim, s.dim + s.count - 1),
    Drop: lambda t, s: t.squeeze(s.dim),
    Insert: lambda t, s: t.unsqueeze(s.dim),
    Narrow: lambda t, s: t.narrow(s.dim, s.start, s.length),
    Pad: _padded,
    Windows: _windowed,
    Fold: _folded,
}


def stepped(tensor: Tensor, steps: Iterable[Step]) -> Tensor:
    """Return the tensor after the steps."""
    for step in steps:
        tensor = _ACTIONS[type(step)](tensor, step)
    return tensor
