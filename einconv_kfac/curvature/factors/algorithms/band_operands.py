"""The blocks of an input along its last dimension, as operands of products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import add_matmul_
from einconv_kfac.curvature.factors.algorithms.output_blocks import Band, are_views, bands
from einconv_kfac.curvature.factors.indices.lag_pairs import Key
from einconv_kfac.curvature.factors.symmetric.region_sums import MOST_GATHERED_CHANNELS, Region
from einconv_kfac.geometry import Geometry


class PaddedRows:
    """An input by the leading positions' remainders, padded along the last dimension.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        dtype: The dtype of the products.
    """

    def __init__(self, x: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
        """Store the input."""
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
        """Return these positions with zeros on both sides, as far as bands reach; cached."""
        if remainders not in self._padded:
            grid, left = self.grid(remainders), self.axis.padding[0]
            found = bands(self.axis, self.channels)
            stop = max(band.start(band.count - 1) + band.width for band in found) + left
            rows = grid.new_zeros(*grid.shape[:-1], stop, dtype=self.dtype)
            inside = min(grid.shape[-1], stop - left)
            rows[..., left : left + inside] = grid[..., :inside]
            self._padded[remainders] = rows
        return self._padded[remainders]


class BandOperand:
    """The blocks of an input along one band, computed on first use.

    Args:
        rows: The input.
        band: The blocks of its last dimension.
    """

    def __init__(self, rows: PaddedRows, band: Band) -> None:
        """Store the input."""
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
        """Sum the products to ``total``, ``[g, c, k, c', k']``, or add the sums to it."""
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
