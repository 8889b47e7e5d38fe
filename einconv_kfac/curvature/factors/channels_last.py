"""Copies with the channels last, made a few channels at a time where more would miss the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.operations import Operation

FAR = 1 << 10
"""Elements between neighbouring channels from which a few channels are copied at a time.

Rows at such distances, often powers of two, compete for the same sets of a cache.
"""

STRIP_CHANNELS = 8
"""Channels that are copied at a time."""


def is_ready(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether ``x``, of shape ``[*s, c]``, is contiguous and in the dtype."""
    return x.is_contiguous() and x.dtype == dtype


def channels_last_copies(target: Tensor, x: Tensor) -> list[Operation]:
    """Return the operations that copy ``x`` to ``target``, both of shape ``[*s, c]``."""
    if x.is_contiguous() or x.stride(-1) < FAR or not profile_of(x.device.type).is_cached:
        return [partial(target.copy_, x)]
    step = range(0, x.shape[-1], STRIP_CHANNELS)
    strips = [slice(start, start + STRIP_CHANNELS) for start in step]
    return [partial(target[..., strip].copy_, x[..., strip]) for strip in strips]
