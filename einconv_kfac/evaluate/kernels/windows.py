"""Unfold, fold and transposed unfold by views, one dimension at a time."""

from __future__ import annotations

from math import prod

from torch import Tensor

from einconv_kfac.geometry import Axis, Geometry
from einconv_kfac.padding import padded


def unfold(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``x[n,c,i] P[k,o,i] -> [n,(c k),(o)]``."""
    x = padded(x, geometry.exact_padding)
    for dim, axis in enumerate(geometry.axes, 2):
        x = x.unfold(dim, axis.span, axis.stride)[..., :: axis.dilation]
    ndim = geometry.ndim  # x: [n, c, o0 .., k0 ..]
    x = x.permute(0, 1, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim))
    return x.flatten(1, 1 + ndim).flatten(2)


def fold(geometry: Geometry, columns: Tensor) -> Tensor:
    """Return ``z[n,(c k),(o)] P[k,o,i] -> [n,c,i]``, the adjoint of `unfold`."""
    kernel, output = geometry.kernel_size, geometry.output_size
    channels = columns.shape[1] // prod(kernel)
    z = columns.reshape(columns.shape[0], channels, *kernel, *output)
    for remaining, axis in zip(range(geometry.ndim, 0, -1), geometry.axes):
        z = fold_axis(z, 2, 2 + remaining, axis.dilation, axis.stride)  # [n, c, k1 .., i0, o1 ..]
        z = z.movedim(1 + remaining, -1)  # [n, c, k1 .., o1 .., i0]
    return padded(z, tuple((-left, -right) for left, right in geometry.exact_padding))


def unfold_transposed(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``x[n,c,o] P[k,o,i] -> [n,(c k),(i)]``."""
    for axis in geometry.axes:
        x = _scattered(x, axis)  # [n, c, o1 .., k0, i0]
    ndim = geometry.ndim  # x: [n, c, k0, i0, k1, i1, ..]
    x = x.permute(0, 1, *range(2, 2 + 2 * ndim, 2), *range(3, 3 + 2 * ndim, 2))
    return x.flatten(1, 1 + ndim).flatten(2)


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
