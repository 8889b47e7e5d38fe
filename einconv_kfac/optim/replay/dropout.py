"""Dropout on a subset of a batch, with the masks of the whole batch."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.replay.substitution import Forwards

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def batch_masks(modules: Collection[nn.Module], subset: Subset) -> Forwards:
    """Return forward methods of dropout layers among modules that draw masks for the whole batch.

    The activations of each example are thereby dropped as in the recorded forward pass, whose
    training modes are restored later.
    """
    dropping = (m for m in modules if type(m) in _DROPOUT)
    return {module: partial(_masked, module, subset) for module in dropping}


def _masked(module: Any, subset: Subset, x: Tensor) -> Tensor:
    """Return dropout of the subset's activations ``[k, ...]``."""
    drop = type(module).forward
    if x.shape[0] != len(subset.rows):
        ordinary: Tensor = drop(module, x)
        return ordinary
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    ones = x.new_ones(subset.size, *x.shape[1:]).contiguous(memory_format=layout)
    mask: Tensor = drop(module, ones)[subset.rows]
    return x * mask


def _is_channels_last(x: Tensor) -> bool:
    """Return whether images are stored channels last."""
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
