"""The weight VJP of small images with many channels: one product for several examples.

Channels are moved innermost, so that the windows of an input, ``[(n o), (k ci)]``, are copied
in pieces as long as there are channels, and a product sums over examples and positions at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import padded

CHANNELS = 32
"""Channels from which on copying them in one piece is worth it."""

EXAMPLE_BYTES = 2**20
"""Windows of one example up to which several of them are worked on at a time."""

CHUNK_BYTES = 2**23
"""Windows that are worked on at a time, per thread."""


def pays(geometry: Geometry, x: Tensor) -> bool:
    """Whether the windows of an input overlap, are few, and have long pieces."""
    if geometry.groups > 1 or x.shape[1] < CHANNELS or x.element_size() < 4:
        return False
    overlap = any(axis.kernel_size > axis.stride for axis in geometry.axes)
    return overlap and _example_bytes(geometry, x) <= EXAMPLE_BYTES


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [co, ci, *k]``."""
    total = x.new_empty(v.shape[1], prod(geometry.kernel_size) * x.shape[1])
    for part in _chunks(geometry, x):
        vectors = v[part].flatten(2).transpose(0, 1).flatten(1)  # [co, (n o)]
        beta = 1 if part.start else 0  # at zero, what stands there is not read
        total.addmm_(vectors, _windows(geometry, x[part]), beta=beta)
    kernels = total.view(v.shape[1], *geometry.kernel_size, x.shape[1])
    return kernels.movedim(-1, 1).contiguous()


def _windows(geometry: Geometry, x: Tensor) -> Tensor:
    """Return the windows of inputs ``[n, ci, *i]``, ``[(n o), (k ci)]``."""
    ndim, channels = geometry.ndim, x.shape[1]
    x = padded(x.movedim(1, -1).contiguous(), [*geometry.padding, (0, 0)])
    for dim, axis in enumerate(geometry.axes, 1):
        x = x.unfold(dim, axis.span, axis.stride)[..., :: axis.dilation]
    x = x.movedim(1 + ndim, -1)  # [n, o0 .., k0 .., ci]
    return x.reshape(-1, prod(geometry.kernel_size) * channels)


def _chunks(geometry: Geometry, x: Tensor) -> Iterator[slice]:
    """Split the batch so that the windows of a chunk are few."""
    n = size = len(x)
    if x.device.type == "cpu":
        size = max(1, CHUNK_BYTES * torch.get_num_threads() // _example_bytes(geometry, x))
    return (slice(start, start + size) for start in range(0, max(n, 1), max(size, 1)))


def _example_bytes(geometry: Geometry, x: Tensor) -> int:
    """Return the bytes of one example's windows."""
    return x.shape[1] * prod(geometry.kernel_size) * geometry.positions * x.itemsize
