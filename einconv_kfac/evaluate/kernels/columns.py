"""The weight VJP of small images with many channels: one product for several examples.

Channels are moved innermost, so that the windows of an input, ``[(n o), (k ci)]``, are copied in
contiguous runs of all channels, and one product sums over examples and positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels.chunks import batch_slices
from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import padded

WINDOWS_MIN_CHANNELS = 32
"""Number of channels from which on copying them as contiguous runs is faster."""

WINDOWS_BYTES_PER_EXAMPLE = 2**20
"""Size of one example's windows up to which a product for several examples is faster."""

WINDOWS_BYTES_PER_THREAD = 2**23
"""Size of the windows of a chunk of examples."""


def pays(geometry: Geometry, x: Tensor) -> bool:
    """Return whether the windows of an input overlap, are few, and have many channels."""
    if geometry.groups > 1 or x.shape[1] < WINDOWS_MIN_CHANNELS or x.element_size() < 4:
        return False
    overlap = any(axis.kernel_size > axis.stride for axis in geometry.axes)
    return overlap and _example_bytes(geometry, x) <= WINDOWS_BYTES_PER_EXAMPLE


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [co, ci, *k]``."""
    total = x.new_empty(v.shape[1], prod(geometry.kernel_size) * x.shape[1])
    for part in _chunks(geometry, x) if len(x) else [slice(0)]:
        vectors = v[part].flatten(2).transpose(0, 1).flatten(1)  # [co, (n o)]
        beta = 1 if part.start else 0  # with zero, `addmm_` does not read the uninitialised total
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
    """Split the batch into chunks of few windows."""
    chunk_bytes = WINDOWS_BYTES_PER_THREAD * torch.get_num_threads()
    return batch_slices(x, _example_bytes(geometry, x), chunk_bytes)


def _example_bytes(geometry: Geometry, x: Tensor) -> int:
    """Return the bytes of one example's windows."""
    return x.shape[1] * prod(geometry.kernel_size) * geometry.positions * x.itemsize
