"""KFAC-reduce: sum over the windows first, then one small product.

The window sums of an input are a product with a 0/1 matrix ``[*k, *i]``, the index pattern summed
over outputs. Positions that meet the same kernel entries are summed before it where that is
cheaper (`pieces`); then the matrix has a column for each of these sums only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.chunking import chunk_size, chunks
from einconv_kfac.curvature.factors.indices.runs import (
    Pieces,
    incidences,
    partition,
    shares_one_product,
)
from einconv_kfac.curvature.factors.symmetric.update import prepare
from einconv_kfac.curvature.factors.symmetric.whole_products import new_whole
from einconv_kfac.geometry import Axis, Geometry

TYPECODES = {torch.float32: "f", torch.float64: "d"}


def reduced_factor(
    sums: Tensor,
    positions: int,
    groups: int,
    *,
    bias: bool = False,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return ``beta out + alpha sum_n abar abar^T`` per group, from sums over positions.

    Args:
        sums: The sums, of shape ``[n, (g d)]``.
        positions: Number of positions that were summed.
        groups: Number of channel groups.
        bias: Whether ``abar`` ends in a 1.
        out: The factors to update, or none; see `prepare`, as for the arguments that follow.
        beta: What the old values are multiplied with.
        alpha: What the new ones are multiplied with.
    """
    rows = sums.reshape(len(sums), groups, -1)
    if bias:
        rows = torch.cat([rows, rows.new_full((len(sums), groups, 1), positions)], 2)
    a, scale = rows.permute(1, 2, 0), alpha / positions**2  # g d n
    found = None if out is not None or beta else new_whole(a, scale)
    if found is None:
        update = prepare(sums, (groups, a.shape[1]), out, beta, scale)
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
        transposed: Whether ``x`` is the input of the transposed convolution, so that the
            windows are over the convolution's inputs.
    """
    axes = geometry.axes
    if all(map(_meets_all, axes, x.shape[2:])):
        return position_sums(x, dtype)
    items = x.shape[0] * x.shape[1]
    pieces = partition(axes, transposed, items)
    if not all(axis.entries for axis in pieces):  # nothing but padding
        entries = prod(axis.kernel_size for axis in axes)
        return x.new_zeros(x.shape[0], x.shape[1] * entries, dtype=dtype)
    matrices = _matrices(x, axes, dtype, transposed)
    if x.dtype == dtype and _is_dense(x):
        return _sums(x, pieces, matrices)
    sums = x.new_empty(x.shape[0], x.shape[1] * prod(geometry.kernel_size), dtype=dtype)
    for part, target in _converted(x, sums):
        target.copy_(_sums(part, pieces, matrices))
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
    """Yield a few examples of ``x`` in the dtype of ``sums`` and where theirs are, in turn."""
    done = 0
    for part in chunks(x, 1.0, min(x.numel() // 2, chunk_size(x.device.type, x.numel()))):
        yield part.to(sums.dtype), sums[done : done + len(part)]
        done += len(part)


def _meets_all(axis: Axis, size: int) -> bool:
    """Return whether the only kernel entry meets every one of ``size`` positions, once."""
    single = axis.kernel_size == axis.stride == 1
    return single and len(axis.outputs(0)) == size


def _is_dense(x: Tensor) -> bool:
    """Return whether the positions of an image follow each other at equal distances."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _sums(x: Tensor, pieces: tuple[Pieces, ...], matrices: tuple[Tensor, ...]) -> Tensor:
    """Return the window sums ``[n, (c *k)]`` of ``x``, of shape ``[n, c, *i]``."""
    for dim, axis in enumerate(pieces, start=2):
        if not axis.are_positions:
            x = _piece_sums(x, dim, axis)
    if len(matrices) == 1:
        return _product(x.flatten(2), matrices[0]).flatten(1)
    leading, last = matrices
    rows = _product(x.flatten(1, -2), last)  # n (c *p) k
    rows = rows.reshape(-1, leading.shape[1], last.shape[0])  # (n c) *p k
    sums = rows.new_empty(len(rows), leading.shape[0], last.shape[0])
    torch.bmm(leading.expand(len(rows), *leading.shape), rows, out=sums)
    return sums.reshape(x.shape[0], -1)


def _piece_sums(x: Tensor, dim: int, pieces: Pieces) -> Tensor:
    """Return ``x`` with dimension ``dim`` summed over the positions of each piece."""
    sizes = [*x.shape]
    sizes[dim] = len(pieces.entries)
    if x.stride(1) == 1:  # channels last
        sums = x.new_empty(sizes[0], *sizes[2:], sizes[1]).movedim(-1, 1)
    else:
        sums = x.new_empty(sizes)
    done = 0
    for run in pieces.runs:
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
            for place, i in enumerate(run.kept):
                torch.sum(periods.select(dim + 1, i), dim, out=target.select(dim, place))
    return sums


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x`` of shape ``[n, r, p]`` times the transpose of ``matrix``, ``[k, p]``.

    Products are written to a given tensor, so that autocast leaves their precision alone.
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
    """Return the matrices ``[k, piece]`` of all axes, or of all but the last, and the last.

    On a CPU their elements are kept; elsewhere they are made where they are needed, without
    waiting for the device.
    """
    items = x.shape[0] * x.shape[1]
    split = len(axes) if shares_one_product(axes, transposed, items) else len(axes) - 1
    parts = tuple(part for part in (axes[:split], axes[split:]) if part)
    if profile_of(x.device.type).is_host and type(x) is Tensor:
        kept = incidences(axes, transposed, items, TYPECODES[dtype])
        rows = (prod(axis.kernel_size for axis in part) for part in parts)
        return tuple(
            torch.frombuffer(values, dtype=dtype).view(k, -1) for values, k in zip(kept, rows)
        )
    pieces = iter(partition(axes, transposed, items))
    return tuple(
        reduce(torch.kron, [_incidence(a, next(pieces), x.device, transposed) for a in part]).to(
            dtype
        )
        for part in parts
    )


def _incidence(axis: Axis, pieces: Pieces, device: torch.device, transposed: bool) -> Tensor:
    """Return which pieces each kernel entry meets, ``[k, piece]``."""
    offsets = torch.arange(axis.kernel_size, device=device)[:, None] * axis.dilation
    offsets = offsets - axis.padding[0]
    if transposed:
        met = torch.arange(axis.output_size, device=device) * axis.stride + offsets
        pattern = (met >= 0) & (met < axis.input_size)
    else:
        steps = torch.arange(axis.input_size, device=device) - offsets  # o S
        pattern = (steps >= 0) & (steps < axis.output_size * axis.stride)
        pattern &= steps % axis.stride == 0
    if pieces.are_positions:
        return pattern.to(torch.float32)
    places = (run.start + i for run in pieces.runs for i in run.kept)
    return torch.cat([pattern[:, i, None] for i in places], 1).to(torch.float32)
