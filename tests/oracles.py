"""Convolutions by torch, and by their definition where torch has none."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.geometry import Geometry

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def dense_patterns(geometry: Geometry) -> list[Tensor]:
    """One pattern ``[k, o, i]`` per dimension, entry by entry."""
    patterns = []
    for axis in geometry.axes:
        sizes = axis.kernel_size, axis.output_size, axis.input_size
        pattern = torch.zeros(sizes, dtype=torch.float64)
        for k, o, i in product(*map(range, sizes)):
            pattern[k, o, i] = i == o * axis.stride + k * axis.dilation - axis.padding[0]
        patterns.append(pattern)
    return patterns


def kernel_matrix(geometry: Geometry) -> Tensor:
    """The pattern of all dimensions together, ``[(*k), (*o), (*i)]``."""
    whole = torch.ones(1, 1, 1, dtype=torch.float64)
    for pattern in dense_patterns(geometry):
        whole = torch.einsum("koi,abc->kaobic", whole, pattern).flatten(4).flatten(2, 3)
        whole = whole.flatten(0, 1)
    return whole


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The forward pass, from the definition, in any dimension."""
    groups = geometry.groups
    xs = x.flatten(2).unflatten(1, (groups, -1))  # [n, g, ci, i]
    ws = weight.flatten(2).unflatten(0, (groups, -1))  # [g, co, ci, k]
    out = torch.einsum("ngci,koi,gdck->ngdo", xs, kernel_matrix(geometry), ws)
    return out.reshape(x.shape[0], weight.shape[0], *geometry.output_size)


def reference(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The forward pass by torch where it has one, else from the definition."""
    if geometry.ndim not in CONVOLUTIONS:
        return convolve(x, weight, geometry)
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    options = geometry.stride, 0, geometry.dilation, geometry.groups
    return CONVOLUTIONS[geometry.ndim](functional.pad(x, sides), weight, None, *options)


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """Unfolded input, from the definition, of shape ``[n, g, (ci k), o]``."""
    xs = x.flatten(2).unflatten(1, (geometry.groups, -1))
    return torch.einsum("ngci,koi->ngcko", xs, kernel_matrix(geometry)).flatten(2, 3)


def unfolded_transposed(x: Tensor, geometry: Geometry) -> Tensor:
    """Unfolded input of the transposed convolution, ``[n, g, (ci k), i]``."""
    xs = x.flatten(2).unflatten(1, (geometry.groups, -1))
    return torch.einsum("ngco,koi->ngcki", xs, kernel_matrix(geometry)).flatten(2, 3)


def contracted(expression: Any) -> Tensor:
    """The value of an einsum expression."""
    equation, operands, shape = expression
    return torch.einsum(equation, *operands).reshape(shape)
