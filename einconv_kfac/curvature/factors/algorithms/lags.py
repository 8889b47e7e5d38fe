"""Lag reuse in all dimensions: one product of channels per lag and region.

See docs/factors.md for the derivation. The regions of the outermost dimension are ranges of
the flattened positions. In the other dimensions, the largest region results from a left
operand that is zero elsewhere; only the strips at the borders are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import add_matmul_
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


def _add_lags_(sums: Sums, pair: Pair, grids: Grids, alpha: float) -> Iterator[Key]:
    """Add the products of all lags between two blocks of channels, one lag after the other."""
    axes = grids.geometry.axes
    work = None
    keys = half_of_lags(axes) if pair[0] == pair[1] else all_lags(axes)
    for (inner, remainder), group in groupby(keys, key=lambda key: (key[1:], key[0].left)):
        grid = grids[(remainder, *(lag.left for lag in inner))][..., slice(*pair[0])]
        work = torch.empty_like(grid) if work is None else work  # fresh memory is slow
        left = _masked(grid, inner, work)
        for key in group:
            total = sums.get((pair, key))
            sums[pair, key] = _add_regions_(total, key, left, grids, pair, alpha)
            yield key


class Grids:
    """The positions of an input by their remainders modulo the stride, computed on first use.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        dtype: The dtype of the grids.
    """

    def __init__(self, x: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
        """Store the input."""
        groups, sizes = geometry.groups, x.shape[2:]
        self._x = x.reshape(x.shape[0], groups, -1, *sizes)
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
    total: Tensor | None, key: Key, left: Tensor, grids: Grids, pair: Pair, alpha: float
) -> Tensor:
    """Add the products of each region to ``total``, of shape ``[*r, g, c, c']``."""
    first = grids[tuple(lag.left for lag in key)][..., slice(*pair[0])]
    second = grids[tuple(lag.right for lag in key)][..., slice(*pair[1])]
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


class LagReuse(Algorithm):
    """Products of channels at each lag, which many entries of the factor share."""

    name = "lags"
    rank = 0
    reads_unmet = True

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
        geometry = problem.geometry
        if geometry.ndim == 1:  # the outermost dimension has a part of its own
            x, geometry = x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
        sums: Sums = {}
        parts = list(chunks(x, _growth(problem)))
        for part in parts:
            grids = Grids(part, geometry, update.out.dtype)
            for pair in channel_pairs(problem):
                block = ChannelBlock(update, pair, geometry) if part is parts[-1] else None
                for key in _add_lags_(sums, pair, grids, update.alpha):
                    if block is not None:
                        total, diagonal = sums.pop((pair, key)), pair[0] == pair[1]
                        write(block.entries, key, total, block.beta, diagonal)
                if block is not None:
                    block.store_()
