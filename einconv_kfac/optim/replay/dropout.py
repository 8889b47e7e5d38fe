"""Dropout in replays: on a subset of a batch, and with tangents.

On a CPU, torch's forward mode of a product with a constant takes a fraction of a millisecond,
however small it is, and so does that of dropout.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay.subsample import Subset
from einconv_kfac.optim.replay.substitution import Forwards
from einconv_kfac.optim.replay.tangents import parts, times

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def batch_masks(modules: Collection[nn.Module], subset: Subset) -> Forwards:
    """Return forward methods of dropout layers among modules that draw masks for the whole batch.

    The activations of each example are thereby dropped as in the recorded forward pass, whose
    training modes are restored later.
    """
    dropping = (m for m in modules if type(m) in _DROPOUT)
    return {module: partial(_masked, module, subset) for module in dropping}


def masks_with_tangents(modules: Collection[nn.Module]) -> Forwards:
    """Return forward methods of dropout layers that multiply values and tangents by one mask.

    Args:
        modules: The modules, of which those that change their input in place are left out.
    """
    dropping = (m for m in modules if type(m) in _DROPOUT and not m.inplace)
    return {module: partial(_times_mask, module) for module in dropping}


def _times_mask(module: Any, x: Tensor) -> Tensor:
    """Return dropout of activations, by a mask that takes the same random numbers."""
    drop = type(module).forward
    if not (x.is_cpu and module.training):
        ordinary: Tensor = drop(module, x)
        return ordinary
    value, _ = parts(x)
    return times(x, drop(module, torch.ones_like(value)))


def _masked(module: Any, subset: Subset, x: Tensor) -> Tensor:
    """Return dropout of the subset's activations ``[k, ...]``."""
    drop = type(module).forward
    if x.shape[0] != len(subset.rows):
        ordinary: Tensor = drop(module, x)
        return ordinary
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    ones = x.new_ones(subset.size, *x.shape[1:]).contiguous(memory_format=layout)
    mask: Tensor = drop(module, ones)[subset.rows]
    return times(x, mask)


def _is_channels_last(x: Tensor) -> bool:
    """Return whether images are stored channels last."""
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
