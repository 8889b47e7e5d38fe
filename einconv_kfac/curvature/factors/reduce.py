"""KFAC-reduce: sum over the windows first, then one small product.

The window sums of an input are a product with a 0/1 matrix ``[*k, *i]``, the index pattern summed
over outputs. Positions that meet the same kernel entries are summed first where that is cheaper
(`indices.runs.partitions`). The matrix then has one column for each of these sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.chunking import chunk_size, chunks
from einconv_kfac.curvature.factors.constant_matrix import ARRAY_TYPECODES, constant_matrix
from einconv_kfac.curvature.factors.indices.runs import (
    AxisPartition,
    incidence_matrices,
    partitions,
    shares_one_product,
    unmet,
)
from einconv_kfac.curvature.factors.one_product import is_one_product, one_product
from einconv_kfac.curvature.factors.symmetric.update import Target, prepare
from einconv_kfac.curvature.factors.symmetric.whole_products import new_whole
from einconv_kfac.geometry import Axis, Geometry


def reduced_factor(
    sums: Tensor, divisor: int, groups: int, target: Target, *, bias: bool = False
) -> Tensor:
    """Return ``beta out + alpha sum_n abar abar^T`` per group, from sums over positions.

    Args:
        sums: The sums, of shape ``[n, (g d)]``.
        divisor: Divisor of the sums, such as the number of positions.
        groups: Number of channel groups.
        target: The factors to update, with ``beta`` and ``alpha``.
        bias: Whether ``abar`` ends in a 1.
    """
    rows = sums.reshape(len(sums), groups, -1)
    if bias:
        rows = torch.cat([rows, rows.new_full((len(sums), groups, 1), divisor)], 2)
    target = target.averaged(divisor**2)
    if groups == 1 and is_one_product(rows, len(rows), rows.shape[2], 1):
        found = one_product(rows.mT, target)
        if found is not None:
            return found
    a = rows.permute(1, 2, 0)  # g d n
    is_new = target.out is None and not target.beta
    found = new_whole(a, target.alpha) if is_new else None
    if found is None:
        update = prepare(sums, (groups, a.shape[1]), target)
        update.add_product_(a)
        found = update.out
    return found


def window_sums(
    x: Tensor, geometry: Geometry, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    """Return the sums over each window, ``[n, (c *k)]``, of ``x``, of shape ``[n, c, *i]``.

    Args:
        x: The input.
        geometry: The convolution.
        dtype: The dtype of the sums.
        transposed: Whether ``x`` is the input of the transposed convolution, whose windows are
            over the inputs of ``geometry``.
    """
    axes = geometry.axes
    if all(map(_meets_all, axes, x.shape[2:])):
        return position_sums(x, dtype)
    items = x.shape[0] * x.shape[1]
    cells = partitions(axes, transposed, items)
    if not all(axis.entries for axis in cells):  # all positions are padding
        entries = prod(axis.kernel_size for axis in axes)
        return x.new_zeros(x.shape[0], x.shape[1] * entries, dtype=dtype)
    matrices = _matrices(x, axes, dtype, transposed)
    if x.dtype == dtype and _is_dense(x):
        return _sums(x, cells, matrices)
    sums = x.new_empty(x.shape[0], x.shape[1] * prod(geometry.kernel_size), dtype=dtype)
    for part, target in _converted(x, sums):
        target.copy_(_sums(part, cells, matrices))
    return sums


def position_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` of shape ``[n, c, *s]`` summed over ``s``."""
    positions = tuple(range(2, x.ndim))
    if x.dtype == dtype or not positions:
        return x.sum(positions) if positions else x.to(dtype)
    sums = x.new_empty(x.shape[:2], dtype=dtype)
    for part, target in _converted(x, sums):
        torch.sum(part, positions, out=target)
    return sums


def _converted(x: Tensor, sums: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some examples of ``x``, in the dtype of ``sums``, and the rows for their sums."""
    done = 0
    for part in chunks(x, 1.0, min(x.numel() // 2, chunk_size(x.device.type, x.numel()))):
        yield part.to(sums.dtype), sums[done : done + len(part)]
        done += len(part)


def _meets_all(axis: Axis, size: int) -> bool:
    """Return whether the kernel has one entry, which meets all ``size`` positions once."""
    single = axis.kernel_size == axis.stride == 1
    return single and len(axis.outputs(0)) == size


def _is_dense(x: Tensor) -> bool:
    """Return whether the positions of an image have equal distances in memory."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _sums(x: Tensor, cells: tuple[AxisPartition, ...], matrices: tuple[Tensor, ...]) -> Tensor:
    """Return the window sums ``[n, (c *k)]`` of ``x``, of shape ``[n, c, *i]``."""
    for dim, axis in enumerate(cells, start=2):
        if not axis.is_finest:
            x = _cell_sums(x, dim, axis)
    x = with_zeros(x, tuple(axis.entries for axis in cells))
    if len(matrices) == 1:
        return _product(x.flatten(2), matrices[0]).flatten(1)
    leading, last = matrices
    rows = _product(x.flatten(1, -2), last)  # n (c *p) k
    rows = rows.reshape(-1, leading.shape[1], last.shape[0])  # (n c) *p k
    sums = rows.new_empty(len(rows), leading.shape[0], last.shape[0])
    torch.bmm(leading.expand(len(rows), *leading.shape), rows, out=sums)
    return sums.reshape(x.shape[0], -1)


def with_zeros(x: Tensor, entries: tuple[tuple[tuple[int, ...], ...], ...]) -> Tensor:
    """Return ``x`` with zeros where no kernel entry meets it.

    A convolution ignores what is there, but in products with zeros, NaN and infinite values turn
    into NaN.

    Args:
        x: A tensor ``[n, c, *i]``.
        entries: For each dimension, the kernel entries that meet each position.
    """
    parts = [(dim, part) for dim, own in enumerate(entries, start=2) for part in unmet(own)]
    if parts:
        x = x.clone()
    for dim, part in parts:
        x[(slice(None),) * dim + (part,)].zero_()
    return x


def _cell_sums(x: Tensor, dim: int, partition: AxisPartition) -> Tensor:
    """Return ``x`` with dimension ``dim`` summed over the positions of each cell."""
    sizes = [*x.shape]
    sizes[dim] = len(partition.entries)
    if x.stride(1) == 1:  # channels last
        sums = x.new_empty(sizes[0], *sizes[2:], sizes[1]).movedim(-1, 1)
    else:
        sums = x.new_empty(sizes)
    done = 0
    for run in partition.runs:
        part = x.narrow(dim, run.start, run.stop - run.start)
        target = sums.narrow(dim, done, len(run.kept))
        done += len(run.kept)
        if not run.is_summed:
            target.copy_(part)
        elif run.period == 1:
            torch.sum(part, dim, keepdim=True, out=target)
        elif run.is_complete:
            torch.sum(torch.unflatten(part, dim, (-1, run.period)), dim, out=target)
        else:
            periods = torch.unflatten(part, dim, (-1, run.period))
            for index, i in enumerate(run.kept):
                torch.sum(periods.select(dim + 1, i), dim, out=target.select(dim, index))
    return sums


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x`` of shape ``[n, r, p]`` times the transpose of ``matrix``, ``[k, p]``.

    Products are written to a given tensor, since autocast does not lower their precision then.
    """
    n, rows, k = x.shape[0], x.shape[1], matrix.shape[0]
    if x.is_contiguous():
        out = x.new_empty(n, rows, k)
        torch.mm(x.view(n * rows, -1), matrix.T, out=out.view(n * rows, k))
        return out
    return torch.bmm(matrix.expand(n, *matrix.shape), x.mT, out=x.new_empty(n, k, rows)).mT


def _matrices(
    x: Tensor, axes: tuple[Axis, ...], dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, ...]:
    """Return the matrices ``[k, cell]`` of all axes, or of all but the last, and the last.

    On a CPU their elements are cached. On other devices they are computed there, which needs no
    synchronisation.
    """
    items = x.shape[0] * x.shape[1]
    split = len(axes) if shares_one_product(axes, transposed, items) else len(axes) - 1
    parts = tuple(part for part in (axes[:split], axes[split:]) if part)
    if profile_of(x.device.type).is_host and type(x) is Tensor:
        kept = incidence_matrices(axes, transposed, items, ARRAY_TYPECODES[dtype])
        rows = (prod(axis.kernel_size for axis in part) for part in parts)
        return tuple(constant_matrix(values, k, dtype) for values, k in zip(kept, rows))
    cells = partitions(axes, transposed, items)
    factors = [_incidence_matrix(a, c, x.device, transposed) for a, c in zip(axes, cells)]
    products = (factors[:split], factors[split:])
    return tuple(reduce(torch.kron, part).to(dtype) for part in products if part)


def _incidence_matrix(
    axis: Axis, partition: AxisPartition, device: torch.device, transposed: bool
) -> Tensor:
    """Return the matrix ``[k, cell]`` that is 1 where a kernel entry meets a cell."""
    offsets = torch.arange(axis.kernel_size, device=device)[:, None] * axis.dilation
    offsets = offsets - axis.padding[0]
    if transposed:
        met = torch.arange(axis.output_size, device=device) * axis.stride + offsets
        pattern = (met >= 0) & (met < axis.input_size)
    else:
        steps = torch.arange(axis.input_size, device=device) - offsets  # o S
        pattern = (steps >= 0) & (steps < axis.output_size * axis.stride)
        pattern &= steps % axis.stride == 0
    if partition.is_finest:
        return pattern.to(torch.float32)
    firsts = (run.start + i for run in partition.runs for i in run.kept)  # of each cell
    return torch.cat([pattern[:, i, None] for i in firsts], 1).to(torch.float32)
