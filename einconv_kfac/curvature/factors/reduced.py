"""KFAC-reduce: average the windows first, then one small product."""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.coincidence import Ranges, cut, lags
from einconv_kfac.curvature.factors.problem import chunks
from einconv_kfac.curvature.factors.update import Update
from einconv_kfac.geometry import Axis, Geometry


def reduced(mean: Tensor, update: Update) -> None:
    """Add ``sum_n abar abar^T`` to the update, from the averages ``[n, (g d)]``."""
    groups, size = update.out.shape[:2]
    update.add_product_(mean.reshape(-1, groups, size).permute(1, 2, 0))


def averages(x: Tensor, geometry: Geometry, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Return the windows' averages ``[n, (c *k)]`` of ``x``, of shape ``[n, c, *i]``.

    Args:
        x: The input.
        geometry: The convolution.
        dtype: The dtype of the averages.
        transposed: Whether ``x`` is the input of the transposed convolution, so that the
            averages are over the convolution's inputs.
    """
    axes = geometry.axes
    sizes = geometry.input_size if transposed else geometry.output_size
    if all(_meets_all(axis, size) for axis, size in zip(axes, x.shape[2:])):
        return x.flatten(2).sum(2, dtype=dtype).div_(prod(sizes))
    if _is_small(axes):
        pattern = reduce(torch.kron, [window_pattern(axis, x, dtype, transposed) for axis in axes])
        flat = torch.cat([part.to(dtype).flatten(2) @ pattern for part in chunks(x, 1.0)])
        return flat.flatten(1).div_(prod(sizes))
    sums = _first_sums(x, axes[0], dtype, transposed).div_(prod(sizes))  # n c k0 *i
    for dim, axis in enumerate(axes[1:], start=3):
        pattern = window_pattern(axis, x, dtype, transposed)
        sums = (sums.movedim(dim, -1) @ pattern).movedim(-1, dim)
    return sums.flatten(1)


def _meets_all(axis: Axis, size: int) -> bool:
    """Return whether the only kernel entry meets every one of ``size`` positions, once."""
    single = axis.kernel_size == axis.stride == 1
    return single and len(axis.outputs(0)) == size


def _is_small(axes: tuple[Axis, ...]) -> bool:
    """Return whether one product with the pattern of all axes beats sums axis by axis."""
    positions = prod(axis.input_size for axis in axes)
    return positions <= 256 and any(2 * axis.kernel_size > axis.input_size for axis in axes)


def window_pattern(axis: Axis, like: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return which positions each kernel entry meets, ``[i, k]``, or ``[o, k]`` if transposed."""
    offsets = torch.arange(axis.kernel_size, device=like.device) * axis.dilation - axis.padding[0]
    if transposed:
        met = torch.arange(axis.output_size, device=like.device)[:, None] * axis.stride + offsets
        return ((met >= 0) & (met < axis.input_size)).to(dtype)
    steps = torch.arange(axis.input_size, device=like.device)[:, None] - offsets  # o S
    inside = (steps >= 0) & (steps < axis.output_size * axis.stride)
    return (inside & (steps % axis.stride == 0)).to(dtype)


def _first_sums(x: Tensor, axis: Axis, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Sum each window of the first spatial dimension of ``x``, ``[n, c, i, ..]``, to ``k``."""
    sums = x.new_zeros(*x.shape[:2], axis.kernel_size, *x.shape[3:], dtype=dtype)
    if transposed:
        ranges = [(met.start, met.stop) for met in map(axis.outputs, range(axis.kernel_size))]
        _add_windows_(sums, x, range(axis.kernel_size), cut(ranges))
        return sums
    for lag in lags(axis):
        if lag.distance == 0:
            grid = x[:, :, lag.left :: axis.stride]
            _add_windows_(sums, grid, lag.entries, (lag.regions, lag.windows))
    return sums


def _add_windows_(sums: Tensor, grid: Tensor, entries: range, parts: tuple[Ranges, Ranges]) -> None:
    """Add to each entry of ``sums``, ``[n, c, k, ..]``, the regions of its window."""
    regions = [grid[:, :, slice(*edges)].sum(2, dtype=sums.dtype) for edges in parts[0]]
    for k, (first, end) in zip(entries, parts[1]):
        for region in regions[first:end]:
            sums[:, :, k].add_(region)
