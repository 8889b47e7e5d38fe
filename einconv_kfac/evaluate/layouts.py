"""The layout of a convolution's result in memory, from those of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Torch's layout with the channels last, by the number of a tensor's dimensions."""


def has_channels_last(*tensors: Tensor) -> bool:
    """Return whether one of the tensors has its channels last, which torch's results then have.

    A tensor that is contiguous in both layouts does not count.
    """
    return any(
        tensor.ndim in _CHANNELS_LAST
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.ndim])
        for tensor in tensors
    )


def layout(ndim: int, channels_last: bool) -> torch.memory_format:
    """Return the layout of a tensor with that number of dimensions, if it can have it."""
    last = _CHANNELS_LAST.get(ndim) if channels_last else None
    return torch.contiguous_format if last is None else last
