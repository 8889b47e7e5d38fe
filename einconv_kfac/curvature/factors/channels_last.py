"""Copies with the channels last, made a few channels at a time where more would miss the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.operations import Operation, run

FAR = 1 << 10
"""Elements between neighbouring channels from which a few channels are copied at a time.

Rows at such distances, often powers of two, compete for the same sets of a cache.
"""

STRIP_CHANNELS = 8
"""Channels that are copied at a time."""


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x``, of shape ``[*s, c]``, contiguous and in the dtype."""
    if x.is_contiguous() or x.stride(-1) < FAR or not profile_of(x.device.type).is_cached:
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
    copy = x.new_empty(x.shape, dtype=dtype)
    run(channels_last_copies(copy, x))
    return copy


def channels_last_copies(target: Tensor, x: Tensor) -> list[Operation]:
    """Return the operations that copy ``x`` to ``target``, both of shape ``[*s, c]``."""
    if x.is_contiguous() or x.stride(-1) < FAR or not profile_of(x.device.type).is_cached:
        return [partial(target.copy_, x)]
    step = range(0, x.shape[-1], STRIP_CHANNELS)
    strips = [slice(start, start + STRIP_CHANNELS) for start in step]
    return [partial(target[..., strip].copy_, x[..., strip]) for strip in strips]
