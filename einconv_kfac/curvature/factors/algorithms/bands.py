"""Lags along the leading dimensions, bands of products along the last: for few channels.

The last dimension is cut into blocks of outputs. One product per lag multiplies all positions
that the outputs of a block meet with each other, for all blocks and examples at once; the
factor's entries are partial sums along its diagonals. That is up to four times more
multiplications per output than lags, but in products that are wide enough to be fast, and
without regions in the last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import WIDE, add_matmul_
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, half_of_lags
from einconv_kfac.curvature.factors.problem import (
    BATCHED,
    Cost,
    Problem,
    chunk_count,
    chunk_size,
    chunks,
    mkl_price,
)
from einconv_kfac.curvature.factors.symmetric.region_sums import (
    MOST_GATHERED_CHANNELS,
    Region,
    regions_of,
    write_regions,
)
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis, Geometry

LEAST = 16
"""Rows and columns from which products of matrices are fast."""

NARROW = 1.6
"""What a multiplication costs in single products with fewer than `WIDE` rows and columns."""


@dataclass(frozen=True)
class Band:
    """Equal blocks of outputs along one axis.

    Args:
        axis: The dimension.
        first: The first block's first output.
        outputs: Outputs in a block.
        width: Positions that are multiplied with each other, at least those a block meets.
        count: Number of blocks.
    """

    axis: Axis
    first: int
    outputs: int
    width: int
    count: int

    def start(self, block: int) -> int:
        """Return the first position that a block meets."""
        return (self.first + block * self.outputs) * self.axis.stride - self.axis.padding[0]


@lru_cache(maxsize=1024)
def bands(axis: Axis, channels: int = 1) -> tuple[Band, ...]:
    """Return the blocks that cover the outputs of ``axis``: equal ones, and what remains.

    Args:
        axis: The dimension.
        channels: Channels that each position has; products are at least `LEAST` wide.
    """
    size = axis.output_size
    least = max(axis.span, -(-LEAST // channels))
    step = 4 if channels < 4 else 1
    widths = [least, *range(-(-least // step) * step, 4 * least + 1, step)]
    outputs = {width: min(size, (width - axis.span) // axis.stride + 1) for width in widths}
    width = min(widths, key=lambda width: -(-size // outputs[width]) * width**2)
    count = -(-size // outputs[width])
    each = -(-size // count)
    found = [Band(axis, 0, each, width, size // each)]
    if size % each:
        found.append(Band(axis, size - size % each, size % each, width, 1))
    return tuple(found)


def banded(x: Tensor, problem: Problem, update: Update) -> None:
    """Add ``sum_{n,o} a a^T`` to the update, from products of blocks of positions."""
    geometry, c = problem.geometry, problem.channels
    if geometry.ndim == 1:  # no dimension to take lags along
        x, geometry = x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
    growth = _growth(geometry.axes[-1], c)
    step = groups_at_once(problem, growth)
    for start in range(0, geometry.groups, step):
        some = replace(geometry, groups=min(step, geometry.groups - start))
        part = x[:, start * c : (start + some.groups) * c]
        parts = list(chunks(part, growth, chunk_size(problem.device, problem.inputs)))
        _add_bands_(parts, some, replace(update, out=update.out[start : start + some.groups]))


def groups_at_once(problem: Problem, growth: float) -> int:
    """Return how many groups to process at a time: half of the input, or less."""
    limit = chunk_size(problem.device, problem.inputs // 2) / growth
    return max(1, int(limit * problem.geometry.groups / problem.inputs))


def _add_bands_(parts: list[Tensor], geometry: Geometry, update: Update) -> None:
    """Add the products of some groups, of at least two dimensions, some examples at a time."""
    leading, last = geometry.axes[:-1], geometry.axes[-1]
    channels = parts[0].shape[1] // geometry.groups
    regions = regions_of(leading)
    entries = (channels, last.kernel_size) * 2
    shape = (len(regions), geometry.groups, *entries)
    sums = parts[0].new_empty(shape, dtype=update.out.dtype)
    is_first = True
    for part in parts:
        rows = Rows(part, geometry, update.out.dtype)
        for band in bands(last, channels):
            operand = _Operand(rows, band)
            for (key, region), total in zip(regions, sums):
                products = operand.products(key, region, update.alpha)
                operand.sum_entries_(products, total, is_first)
            is_first = False
            del operand  # not to be kept while the next one is made
        del rows
    write_regions(sums, leading, update)


def _growth(axis: Axis, channels: int) -> float:
    """Return how many times larger than its input the blocks of an axis are."""
    return sum(band.count * band.width for band in bands(axis, channels)) / axis.input_size


def banded_cost(problem: Problem) -> Cost:
    """Return what `banded` does."""
    *leading, last = problem.geometry.axes
    keys = half_of_lags(tuple(leading)) if leading else ((),)
    found = list(bands(last, problem.channels))
    rows = sum(
        prod(key[i].regions[-1][1] - key[i].regions[0][0] for i in range(len(key))) for key in keys
    )
    regions = sum(prod(len(lag.regions) for lag in key) for key in keys)
    groups, channels = problem.geometry.groups, problem.channels
    macs = sum(rows * band.count * (channels * band.width) ** 2 for band in found)
    width = channels * max(band.width for band in found)
    entries = groups * (channels * last.kernel_size) ** 2
    sums = regions * sum(band.outputs for band in found) * entries
    growth = _growth(last, channels)
    steps = -(-groups // groups_at_once(problem, growth))
    count = chunk_count(problem, growth) if groups == 1 else 1
    blocks = sum(band.count for band in found) if are_views(groups, channels) else 0
    copied = problem.inputs * (2 if blocks else 1 + growth)
    products = count * regions * (10 * len(found) + 4 * blocks)
    calls = products * (steps + BATCHED * (groups - 1)) + 30 * steps * len(keys)
    along = 0.6 if channels <= MOST_GATHERED_CHANNELS else 0.42  # diagonals, but in order
    written = along * (problem.outputs + count * sums)
    price = mkl_price(problem) * problem.batch * groups
    price *= NARROW if groups == 1 and width < WIDE else 1.0
    return Cost(macs * price, width, copied, written, calls)


def are_views(groups: int, channels: int) -> bool:
    """Return whether blocks are views of rows: in batches of products of single channels."""
    return groups > 1 and channels == 1


class Rows:
    """An input by the leading positions' remainders, padded along the last dimension.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        dtype: The dtype of the products.
    """

    def __init__(self, x: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
        """Remember the input."""
        x = x.reshape(x.shape[0], geometry.groups, -1, *x.shape[2:])
        self.channels, self.dtype, self.axis = x.shape[2], dtype, geometry.axes[-1]
        self._strides = geometry.stride[:-1]
        self._x = x.movedim((0, 2), (-3, -2))  # g *i n c i
        self._padded: dict[tuple[int, ...], Tensor] = {}

    def grid(self, remainders: tuple[int, ...]) -> Tensor:
        """View the positions with these remainders, ``[g, *t, n, c, i]``."""
        index = (slice(r, None, s) for r, s in zip(remainders, self._strides))
        return self._x[(slice(None), *index)]

    def padded(self, remainders: tuple[int, ...]) -> Tensor:
        """Return them with zeros on both sides, as far as bands reach; made once."""
        if remainders not in self._padded:
            grid, left = self.grid(remainders), self.axis.padding[0]
            found = bands(self.axis, self.channels)
            stop = max(band.start(band.count - 1) + band.width for band in found) + left
            rows = grid.new_zeros(*grid.shape[:-1], stop, dtype=self.dtype)
            inside = min(grid.shape[-1], stop - left)
            rows[..., left : left + inside] = grid[..., :inside]
            self._padded[remainders] = rows
        return self._padded[remainders]


class _Operand:
    """The blocks of an input along one band, made when asked for.

    Args:
        rows: The input.
        band: The blocks of its last dimension.
    """

    def __init__(self, rows: Rows, band: Band) -> None:
        """Remember the input."""
        self._rows, self.band, self.channels = rows, band, rows.channels
        self._made: dict[tuple[int, ...], list[Tensor]] = {}
        self._repeats = 1  # blocks that follow each other at each position

    def __getitem__(self, remainders: tuple[int, ...]) -> list[Tensor]:
        """Return the blocks ``[g, *t, (t n), (c w)]`` of the positions with these remainders.

        Those of depthwise convolutions are views, and products of a batch. Those of others
        follow each other along ``n``, so that there is one large product.
        """
        if remainders not in self._made:
            grid = self._rows.grid(remainders)
            if not are_views(len(grid), self.channels):
                blocks = [self._copied(grid)]
            else:
                padded, left = self._rows.padded(remainders), self.band.axis.padding[0]
                starts = (self.band.start(block) + left for block in range(self.band.count))
                width = self.band.width
                blocks = [padded[..., start : start + width].flatten(-2) for start in starts]
            self._repeats = blocks[0].shape[-2]
            self._made[remainders] = [block.flatten(-3, -2) for block in blocks]
        return self._made[remainders]

    def _copied(self, x: Tensor) -> Tensor:
        """Copy the blocks of the last dimension of ``x``, ``[g, *t, n, c, i]``."""
        band = self.band
        shape = (*x.shape[:-3], band.count, *x.shape[-3:-1], band.width)
        blocks = x.new_zeros(shape, dtype=self._rows.dtype)  # g *t b n c w
        for block in range(band.count):
            start = band.start(block)
            low, high = max(0, start), min(x.shape[-1], start + band.width)
            if low < high:
                blocks[..., block, :, :, low - start : high - start] = x[..., low:high]
        return blocks.flatten(-2).flatten(-3, -2)

    def products(self, key: Key, region: Region, alpha: float) -> Tensor:
        """Return the products ``[g, (c w), (c' w')]`` of the blocks in one region."""
        shifted = tuple((a + lag.shift, b + lag.shift) for (a, b), lag in zip(region, key))
        lefts, rights = (self[tuple(side)] for side in zip(*((g.left, g.right) for g in key)))
        size, beta = lefts[0].shape[-1], 0.0
        products = lefts[0].new_empty(len(lefts[0]), size, size)
        for left, right in zip(lefts, rights):
            columns, rows = self._box(left, region).mT, self._box(right, shifted)
            add_matmul_(products, columns, rows, beta, alpha)
            beta = 1.0
        return products

    def _box(self, blocks: Tensor, ranges: Region) -> Tensor:
        """Return the positions of a region in ``[g, *t, (t n), (c w)]``, as ``[g, r, (c w)]``."""
        start, stop = (edge * self._repeats for edge in ranges[-1])
        rows = blocks.narrow(-2, start, stop - start)
        if len(ranges) == 1:
            return rows
        outer: tuple[Any, ...] = (slice(None), *(slice(*edges) for edges in ranges[:-1]))
        return rows[outer].flatten(1, -2)

    def sum_entries_(self, products: Tensor, total: Tensor, is_first: bool) -> None:
        """Sum the products to ``total``, ``[g, c, k, c', k']``, or add them to what it has."""
        axis, c, w, row = self.band.axis, self.channels, self.band.width, products.shape[-1]
        sizes = (len(products), c, axis.kernel_size, c, axis.kernel_size, self.band.outputs)
        strides = (
            row * row,
            w * row,
            axis.dilation * row,
            w,
            axis.dilation,
            axis.stride * (row + 1),
        )
        terms = products.as_strided(sizes, strides)
        if c > MOST_GATHERED_CHANNELS:  # a short sum of many is slow
            first, *others = terms.unbind(-1)
            total.copy_(first) if is_first else total.add_(first)
            for term in others:
                total.add_(term)
        elif is_first:
            torch.sum(terms, -1, out=total)
        else:
            total.add_(terms.sum(-1))
