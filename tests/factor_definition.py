"""The input-based factors by their definition: unfold with dense patterns, and multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.geometry import Axis, Geometry


def dense_pattern(axis: Axis) -> Tensor:
    """Return ``[k, o, i]``, 1 where input ``i`` meets kernel entry ``k`` for output ``o``."""
    k, o, i = torch.meshgrid(
        torch.arange(axis.kernel_size),
        torch.arange(axis.output_size),
        torch.arange(axis.input_size),
        indexing="ij",
    )
    return (i == o * axis.stride + k * axis.dilation - axis.padding[0]).double()


def columns(x: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
    """Return the unfolded input ``[n, g, (ci k), s]`` of ``x``, of shape ``[n, c, *i]``."""
    n, d = x.shape[0], geometry.ndim
    for axis in geometry.axes:  # the first spatial dimension goes, k and s come last
        pattern = dense_pattern(axis)
        if transposed:  # a large output padding leaves outputs that the layer's input lacks
            pattern = pattern[:, : x.shape[2]].transpose(1, 2)
        x = torch.tensordot(x, pattern, dims=([2], [2]))
    kernel, sites = range(2, 2 + 2 * d, 2), range(3, 3 + 2 * d, 2)
    x = x.permute(0, 1, *kernel, *sites).flatten(2 + d)
    return x.reshape(n, geometry.groups, -1, x.shape[-1])


def factor(columns: Tensor, approximation: str, bias: bool = False) -> Tensor:
    """Return the factor ``[g, d, d]`` of the columns ``[n, g, d, s]``."""
    if bias:
        columns = torch.cat([columns, torch.ones_like(columns[:, :, :1])], dim=2)
    if approximation == "reduce":
        columns = columns.mean(-1, keepdim=True)
    return torch.einsum("ngas,ngbs->gab", columns, columns) / columns.shape[0]
