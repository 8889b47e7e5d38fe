"""Unfold, fold and transposed unfold by views, one dimension at a time.

Their results are contiguous, and no views of what they are given.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from einconv_kfac.geometry import Axis, Geometry
from einconv_kfac.padding import padded

WIDE = 2**20
"""Padded size from which on windows are gathered where they have fewer positions."""


def unfold(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``x[n,c,i] P[k,o,i] -> [n,(c k),(o)]``."""
    copy = windows_of(geometry, x).clone(memory_format=torch.contiguous_format)
    return copy.flatten(1, 1 + geometry.ndim).flatten(2)


def windows_of(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``x[n,c,i] P[k,o,i] -> [n,c,k,o]``, a view of the padded input."""
    if is_wide(geometry):
        x = _gathered(geometry, x)
    else:
        x = padded(x, geometry.exact_padding)
        for dim, axis in enumerate(geometry.axes, 2):
            x = x.unfold(dim, axis.span, axis.stride)[..., :: axis.dilation]
    ndim = geometry.ndim  # x: [n, c, o0 .., k0 ..]
    return x.permute(0, 1, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim))


def fold(geometry: Geometry, columns: Tensor) -> Tensor:
    """Return ``z[n,(c k),(o)] P[k,o,i] -> [n,c,i]``, the adjoint of `unfold`."""
    kernel, output = geometry.kernel_size, geometry.output_size
    channels = columns.shape[1] // prod(kernel)
    z = columns.reshape(columns.shape[0], channels, *kernel, *output)
    if is_wide(geometry):
        return _summed(geometry, z)
    for remaining, axis in zip(range(geometry.ndim, 0, -1), geometry.axes):
        z = fold_axis(z, 2, 2 + remaining, axis.dilation, axis.stride)  # [n, c, k1 .., i0, o1 ..]
        z = z.movedim(1 + remaining, -1)  # [n, c, k1 .., o1 .., i0]
    image = padded(z, tuple((-left, -right) for left, right in geometry.exact_padding))
    is_view = all(axis.kernel_size == axis.stride == 1 for axis in geometry.axes)
    return image.clone(memory_format=torch.contiguous_format) if is_view else image.contiguous()


def unfold_transposed(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``x[n,c,o] P[k,o,i] -> [n,(c k),(i)]``."""
    for axis in geometry.axes:
        x = _scattered(x, axis)  # [n, c, o1 .., k0, i0]
    ndim = geometry.ndim  # x: [n, c, k0, i0, k1, i1, ..]
    x = x.permute(0, 1, *range(2, 2 + 2 * ndim, 2), *range(3, 3 + 2 * ndim, 2))
    return x.flatten(1, 1 + ndim).flatten(2).contiguous()


def fold_axis(z: Tensor, kernel: int, output: int, dilation: int, stride: int) -> Tensor:
    """Sum overlapping windows along one axis.

    Dimension ``kernel`` is removed, and ``output`` becomes the padded input positions.
    """
    entries, outputs = z.shape[kernel], z.shape[output]
    span = (outputs - 1) * stride + 1
    shape = [*z.shape[:kernel], *z.shape[kernel + 1 :]]
    shape[output - 1] = span + (entries - 1) * dilation
    if entries == 1 and stride == 1:
        return z.reshape(shape)
    folded = z.new_zeros(shape)
    every = (slice(None),) * (output - 1) + (slice(None, None, stride),)
    for entry in range(entries):
        folded.narrow(output - 1, entry * dilation, span)[every].add_(z.select(kernel, entry))
    return folded


def is_wide(geometry: Geometry) -> bool:
    """Return whether a padded input is large, and larger than all windows in a dimension."""
    return any(type(axis.input_size) is int and _is_wide(axis) for axis in geometry.axes)


def _is_wide(axis: Axis) -> bool:
    """Return whether that is so in one dimension."""
    return axis.covered_size > max(WIDE, axis.kernel_size * axis.output_size)


def _gathered(geometry: Geometry, x: Tensor) -> Tensor:
    """Return the windows ``[n, c, o0 .., k0 ..]`` of an input without a padded copy."""
    for dim, axis in enumerate(geometry.axes, 2):
        index = _positions(axis, x.device)  # [(o k)]
        outside = (index < 0).reshape(-1, *(1,) * (x.ndim - dim - 1))
        x = x.index_select(dim, index.clamp_min(0)).masked_fill(outside, 0)
        x = torch.unflatten(x, dim, (axis.output_size, axis.kernel_size)).movedim(dim + 1, -1)
    return x


def _summed(geometry: Geometry, z: Tensor) -> Tensor:
    """Return the sum ``[n, c, *i]`` of windows ``[n, c, *k, *o]`` without a padded result."""
    for remaining, axis in zip(range(geometry.ndim, 0, -1), geometry.axes):
        index, size = _positions(axis, z.device), axis.input_size
        z = z.movedim((2 + remaining, 2), (-2, -1)).flatten(-2)  # [n, c, k1 .., o1 .., (o0 k0)]
        index = index.where(index >= 0, size)  # padding is summed behind the image
        z = z.new_zeros(*z.shape[:-1], size + 1).index_add(-1, index, z).narrow(-1, 0, size)
    return z


def _positions(axis: Axis, device: torch.device) -> Tensor:
    """Return the input position that each window entry ``[(o k)]`` meets, or -1 for padding."""
    start = torch.arange(axis.output_size, device=device)[:, None] * axis.stride
    entry = torch.arange(axis.kernel_size, device=device) * axis.dilation
    position = (start + entry - axis.padding[0]).flatten()
    return position.where((position >= 0) & (position < axis.input_size), -1)


def _scattered(x: Tensor, axis: Axis) -> Tensor:
    """Replace the first spatial dimension ``o`` by two last dimensions ``[k, i]``."""
    x = x.movedim(2, -1)
    span = (axis.output_size - 1) * axis.stride + 1
    scattered = x.new_zeros(*x.shape[:-1], axis.kernel_size, axis.covered_size)
    for entry in range(axis.kernel_size):
        target = scattered[..., entry, :].narrow(-1, entry * axis.dilation, span)
        target[..., :: axis.stride] = x
    left, right = axis.exact_padding
    return padded(scattered, [(-left, -right)])
