"""The operands of products at lags: grids of positions, masked, or copied boxes at the borders.

Views and buffers are made before any operation runs. The operations fill them, in order.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, flattened
from einconv_kfac.curvature.factors.channels_last import channels_last_copies
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, grid_size
from einconv_kfac.geometry import Geometry


class Grids:
    """The positions of an input by their remainders modulo the stride, prepared on first use.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        dtype: The dtype of the grids.
    """

    def __init__(self, x: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
        """Store the input."""
        self._x, self._geometry, self._dtype = x, geometry, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}
        self.are_copies = True

    def __getitem__(self, remainders: tuple[int, ...]) -> Tensor:
        """Return the grid ``[g, t0, n, *t, c]`` of the positions with these remainders."""
        if remainders not in self._made:
            self._made[remainders] = self._new(self._positions(self._x, remainders))
        return self._made[remainders]

    def copies(self, x: Tensor) -> list[Operation]:
        """Return the copies of an input of the same shape to all grids."""
        found: list[Operation] = []
        for remainders, grid in self._made.items():
            part = self._positions(x, remainders)
            if self.are_copies:
                target = grid[tuple(slice(size) for size in part.shape)]
                found += channels_last_copies(target, part)
        return found

    def _positions(self, x: Tensor, remainders: tuple[int, ...]) -> Tensor:
        """View the positions with these remainders, ``[g, t0, n, *t, c]``."""
        axes, groups = self._geometry.axes, self._geometry.groups
        x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        strides: tuple[Any, ...] = tuple(
            slice(r, None, axis.stride) for r, axis in zip(remainders, axes)
        )
        return x[(..., *strides)].movedim((3, 0, 2), (1, 2, -1))

    def _new(self, part: Tensor) -> Tensor:
        """Return a grid for some positions; grids are equally large, and zero beyond the input."""
        sizes = [grid_size(axis) for axis in self._geometry.axes]
        shape = (part.shape[0], sizes[0], part.shape[2], *sizes[1:], part.shape[-1])
        if part.shape != shape:
            return part.new_zeros(shape, dtype=self._dtype)
        if part.is_contiguous() and part.dtype == self._dtype:
            self.are_copies = False
            return part
        return part.new_empty(shape, dtype=self._dtype)


def masked(grid: Tensor, inner: Key, scratch: Scratch) -> tuple[Tensor, list[Operation]]:
    """Return the grid ``[g, t0, n, *t, c]`` with zeros outside the interior of ``t``."""
    kept = [lag.regions[lag.interior] for lag in inner]
    if all(stop - start == size for (start, stop), size in zip(kept, grid.shape[3:])):
        return grid, []
    work = scratch.empty(grid.shape, grid, "masked")
    operations: list[Operation] = [partial(work.copy_, grid)]
    for dim, (start, stop) in enumerate(kept, start=3):
        outside = work.narrow(dim, 0, start), work.narrow(dim, stop, work.shape[dim] - stop)
        operations += [part.zero_ for part in outside if part.numel()]
    return work, operations


def rows_of(left: Tensor, right: Tensor, key: Key, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """View the flattened interior of a range of rows, ``[g, t, c]`` and ``[g, t, c']``."""
    sizes = left.shape[2:-1]
    row = prod(sizes)
    inner = sum(lag.shift * prod(sizes[j:]) for j, lag in enumerate(key[1:], start=2))
    start = rows[0] * row + max(0, -inner)  # the rest is zero
    stop = rows[1] * row - max(0, inner)
    shift = key[0].shift * row + inner
    return left.flatten(1, -2)[:, start:stop], right.flatten(1, -2)[:, start + shift : stop + shift]


def boxes_of(
    left: Tensor, right: Tensor, key: Key, region: tuple[int, ...], scratch: Scratch
) -> tuple[Tensor, Tensor, list[Operation]]:
    """Return the positions of one region, ``[g, t, c]`` and ``[g, t, c']``, and their copies."""
    ranges = [lag.regions[index] for lag, index in zip(key, region)]
    here = [slice(start, stop) for start, stop in ranges]
    there = [slice(a + lag.shift, b + lag.shift) for (a, b), lag in zip(ranges, key)]
    every = slice(None)
    box: tuple[Any, ...] = (every, here[0], every, *here[1:])
    shifted: tuple[Any, ...] = (every, there[0], every, *there[1:])
    first, copies = flattened(left[box], 1, -2, scratch, "left")
    second, others = flattened(right[shifted], 1, -2, scratch, "right")
    return first, second, [*copies, *others]
