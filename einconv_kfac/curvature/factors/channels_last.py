"""Copies with the channels last, a few channels at a time where many would not fit a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of

FAR = 1 << 10
"""Elements between channels from which a few are copied at a time.

Rows that are far apart, and often by a power of two, compete for the same places of a cache.
"""

STRIP = 8
"""Channels that are copied at a time."""


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x``, whose last dimension are the channels, contiguous and in the dtype."""
    if x.is_contiguous() or x.stride(-1) < FAR or not profile_of(x.device.type).is_cached:
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
    copy = x.new_empty(x.shape, dtype=dtype)
    for start in range(0, x.shape[-1], STRIP):
        strip = slice(start, start + STRIP)
        copy[..., strip] = x[..., strip]
    return copy
