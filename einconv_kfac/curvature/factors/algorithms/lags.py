"""Lag reuse in all dimensions: one product of channels per lag and region.

See docs/factors.md for the derivation. The regions of the outermost dimension are ranges of
the flattened positions. In the other dimensions, the largest region results from a left
operand that is zero elsewhere; only the strips at the borders are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import add_matmul_
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    SCATTERED_ELEMENT_COPIES,
    Algorithm,
    Cost,
)
from einconv_kfac.curvature.factors.channels_last import channels_last
from einconv_kfac.curvature.factors.chunking import chunk_count, chunks
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, all_lags, grid_size, half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.channel_blocks import (
    ChannelBlock,
    Pair,
    channel_pairs,
    edges,
)
from einconv_kfac.curvature.factors.symmetric.scatter import write
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis, Geometry

Sums = dict[tuple[Pair, Key], Tensor]

LAG_MAC_PRICE = 1.2
"""Price of a multiplication in products of one block of channels, relative to wide ones."""


def _growth(problem: Problem) -> float:
    """Return how many copies of a part to count: two, where the sums are small beside them."""
    sums = len(half_of_lags(problem.geometry.axes)) * problem.channels**2
    return 2.0 if 4 * sums * problem.geometry.groups < problem.inputs else 1.0


def _border(key: Key) -> int:
    """Return the positions in the regions that are copied."""
    sizes = [[stop - start for start, stop in lag.regions] for lag in key]
    interior = prod(size[lag.interior] for size, lag in zip(sizes[1:], key[1:]))
    return sum(sizes[0]) * (prod(map(sum, sizes[1:])) - interior)


def _add_lags_(sums: Sums, pair: Pair, sides: Sides, alpha: float) -> Iterator[Key]:
    """Add the products of all lags between two blocks of channels, one lag after the other."""
    axes = sides[0].geometry.axes
    work = None
    keys = half_of_lags(axes) if pair[0] == pair[1] else all_lags(axes)
    for (inner, remainder), group in groupby(keys, key=lambda key: (key[1:], key[0].left)):
        grid = sides[0][(remainder, *(lag.left for lag in inner))]
        work = torch.empty_like(grid) if work is None else work  # fresh memory is slow
        left = _masked(grid, inner, work)
        for key in group:
            total = sums.get((pair, key))
            sums[pair, key] = _add_regions_(total, key, left, sides, alpha)
            yield key


class Grids:
    """The positions of an input by their remainders modulo the stride, computed on first use.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        dtype: The dtype of the grids.
        channels: The bounds of the block of channels of each group.
    """

    def __init__(
        self, x: Tensor, geometry: Geometry, dtype: torch.dtype, channels: tuple[int, int]
    ) -> None:
        """Store the input."""
        groups, sizes = geometry.groups, x.shape[2:]
        self._x = x.reshape(x.shape[0], groups, -1, *sizes)[:, :, slice(*channels)]
        self.geometry, self._dtype = geometry, dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __getitem__(self, remainders: tuple[int, ...]) -> Tensor:
        """Return the grid ``[g, t0, n, *t, c]`` of the positions with these remainders."""
        if remainders not in self._made:
            self._made[remainders] = self._grid(remainders)
        return self._made[remainders]

    def _grid(self, remainders: tuple[int, ...]) -> Tensor:
        """Copy the positions with these remainders; grids are equally large."""
        axes = self.geometry.axes
        index: tuple[Any, ...] = (
            ...,
            *(slice(r, None, axis.stride) for r, axis in zip(remainders, axes)),
        )
        part = self._x[index].movedim((3, 0, 2), (1, 2, -1))  # g t0 n *t c
        sizes = [grid_size(axis) for axis in axes]
        shape = (part.shape[0], sizes[0], part.shape[2], *sizes[1:], part.shape[-1])
        if part.shape == shape:
            return channels_last(part, self._dtype)
        grid = part.new_zeros(shape, dtype=self._dtype)
        grid[tuple(slice(size) for size in part.shape)] = part
        return grid


def _masked(grid: Tensor, inner: Key, work: Tensor) -> Tensor:
    """Return the grid ``[g, t0, n, *t, c]``, zero outside the interior of ``t``."""
    kept = [lag.regions[lag.interior] for lag in inner]
    if all(stop - start == size for (start, stop), size in zip(kept, grid.shape[3:])):
        return grid
    work.copy_(grid)
    for dim, (start, stop) in enumerate(kept, start=3):
        work.narrow(dim, 0, start).zero_()
        work.narrow(dim, stop, work.shape[dim] - stop).zero_()
    return work


def _add_regions_(
    total: Tensor | None, key: Key, left: Tensor, sides: Sides, alpha: float
) -> Tensor:
    """Add the products of each region to ``total``, of shape ``[*r, g, c, c']``."""
    first = sides[0][tuple(lag.left for lag in key)]
    second = sides[1][tuple(lag.right for lag in key)]
    beta = 1.0
    if total is None:
        regions = [len(lag.regions) for lag in key]
        shape = (*regions, first.shape[0], first.shape[-1], second.shape[-1])
        total, beta = left.new_empty(shape), 0.0
    interior = tuple(lag.interior for lag in key[1:])
    for region in product(*(range(len(lag.regions)) for lag in key)):
        if region[1:] == interior:
            here, there = _rows(left, second, key, key[0].regions[region[0]])
        else:
            here, there = _boxes(first, second, key, region)
        add_matmul_(total[region], here.mT, there, beta, alpha)
    return total


def _rows(left: Tensor, right: Tensor, key: Key, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """View the flattened interior of a range of rows, ``[g, t, c]`` and ``[g, t, c']``."""
    sizes = left.shape[2:-1]
    row = prod(sizes)
    inner = sum(lag.shift * prod(sizes[j:]) for j, lag in enumerate(key[1:], start=2))
    start = rows[0] * row + max(0, -inner)  # the rest is zero
    stop = rows[1] * row - max(0, inner)
    shift = key[0].shift * row + inner
    return left.flatten(1, -2)[:, start:stop], right.flatten(1, -2)[:, start + shift : stop + shift]


def _boxes(left: Tensor, right: Tensor, key: Key, region: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Copy the positions of one region, ``[g, t, c]`` and ``[g, t, c']``."""
    ranges = [lag.regions[index] for lag, index in zip(key, region)]
    here = [slice(*edges) for edges in ranges]
    there = [slice(a + lag.shift, b + lag.shift) for (a, b), lag in zip(ranges, key)]
    every = slice(None)
    box, shifted = ((every, side[0], every, *side[1:]) for side in (here, there))
    return left[box].flatten(1, -2), right[shifted].flatten(1, -2)


Sides = tuple[Grids, Grids]
"""The left and the right block of channels of a pair."""


def _add_pairs_(
    x: Tensor, pairs: list[Pair], geometry: Geometry, problem: Problem, update: Update
) -> None:
    """Add the entries between some blocks of channels, some examples at a time."""
    sums: Sums = {}
    parts = list(chunks(x, _growth(problem), tasks=problem.tasks))
    for part in parts:
        grids = {
            edge: Grids(part, geometry, update.out.dtype, edge)
            for edge in dict.fromkeys(edge for pair in pairs for edge in pair)
        }
        for pair in pairs:
            block = ChannelBlock(update, pair, geometry) if part is parts[-1] else None
            sides = grids[pair[0]], grids[pair[1]]
            for key in _add_lags_(sums, pair, sides, update.alpha):
                if block is not None:
                    total, diagonal = sums.pop((pair, key)), pair[0] == pair[1]
                    write(block.entries, key, total, block.beta, diagonal)
            if block is not None:
                block.store_()


class LagReuse(Algorithm):
    """Products of channels at each lag, which many entries of the factor share."""

    name = "lags"
    rank = 0
    reads_unmet = True
    has_channel_tasks = True

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        axes = problem.geometry.axes
        axes = (Axis(1, 1), *axes) if len(axes) == 1 else axes
        keys, blocks = half_of_lags(axes), len(edges(problem)) - 1
        groups, samples = problem.geometry.groups, problem.batch * problem.geometry.groups
        row = prod(grid_size(axis) for axis in axes[1:])
        rows = sum(key[0].regions[-1][1] - key[0].regions[0][0] for key in keys)
        masks = len({(key[1:], key[0].left) for key in keys}) * grid_size(axes[0]) * row
        regions = sum(prod(len(lag.regions) for lag in key) for key in keys)
        strips = 2 * SCATTERED_ELEMENT_COPIES * sum(_border(key) for key in keys)
        copied = samples * problem.channels * (masks + strips * blocks)
        price = LAG_MAC_PRICE * problem.matmul_price(problem.channels / blocks)
        macs = price * rows * row * samples * problem.channels**2
        products = chunk_count(problem, 1.0) * regions * (1 + BATCHED_MATRIX_CALLS * (groups - 1))
        calls = blocks**2 * (8 * products + 30 * len(keys))
        return Cost(macs, problem.channels / blocks, copied, problem.outputs, calls)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from products that many entries share."""
        x, geometry = _with_rows(x, problem.geometry)
        _add_pairs_(x, channel_pairs(problem), geometry, problem, update)

    def tasks(self, x: Tensor, problem: Problem, update: Update) -> list[Task]:
        """Return a task for each pair of blocks of channels."""
        x, geometry = _with_rows(x, problem.geometry)
        pairs = sorted(channel_pairs(problem), key=lambda pair: pair[0] == pair[1])
        return [partial(_add_pairs_, x, [pair], geometry, problem, update) for pair in pairs]


def _with_rows(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return at least two dimensions, since the outermost one has a part of its own."""
    if geometry.ndim > 1:
        return x, geometry
    return x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
