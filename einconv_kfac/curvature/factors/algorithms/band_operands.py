"""The blocks of an input along its last dimension, as operands of products.

Views and buffers are made before any operation runs. The operations fill them, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, flattened
from einconv_kfac.curvature.devices.products import matmul
from einconv_kfac.curvature.factors.algorithms.output_blocks import Band, are_views, bands
from einconv_kfac.curvature.factors.indices.lag_pairs import Key
from einconv_kfac.curvature.factors.symmetric.region_sums import MOST_GATHERED_CHANNELS, Region
from einconv_kfac.geometry import Geometry

Remainders = tuple[int, ...]
"""The leading positions' remainders modulo the strides."""


class PaddedRows:
    """An input by the leading positions' remainders, padded along the last dimension.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        scratch: Memory for copies, which those of the next input overwrite.
        dtype: The dtype of the products.
    """

    def __init__(self, x: Tensor, geometry: Geometry, scratch: Scratch, dtype: torch.dtype) -> None:
        """Store the input."""
        x = x.reshape(x.shape[0], geometry.groups, -1, *x.shape[2:])
        self.channels, self.scratch, self.axis = x.shape[2], scratch, geometry.axes[-1]
        self._strides, self.dtype = geometry.stride[:-1], dtype
        self._x = x.movedim((0, 2), (-3, -2))  # g *i n c i
        self._padded: dict[Remainders, Tensor] = {}

    def grid(self, remainders: Remainders) -> Tensor:
        """View the positions with these remainders, ``[g, *t, n, c, i]``."""
        index = (slice(r, None, s) for r, s in zip(remainders, self._strides))
        return self._x[(slice(None), *index)]

    def padded(self, remainders: Remainders) -> tuple[Tensor, list[Operation]]:
        """Return these positions with zeros on both sides, as far as bands reach.

        The operations fill it; there are none if it was returned before.
        """
        if remainders in self._padded:
            return self._padded[remainders], []
        grid, left = self.grid(remainders), self.axis.padding[0]
        found = bands(self.axis, self.channels)
        stop = max(band.start(band.count - 1) + band.width for band in found) + left
        rows = self.empty((*grid.shape[:-1], stop), ("padded", remainders))
        self._padded[remainders] = rows
        return rows, _copies(rows, grid, -left)

    def empty(self, shape: tuple[int, ...], use: tuple[Any, ...]) -> Tensor:
        """Return memory of the products' dtype."""
        return self.scratch.empty(shape, self._x, use, self.dtype)


def _copies(target: Tensor, x: Tensor, start: int) -> list[Operation]:
    """Return the copy of the positions from ``start``, of the last dimension, with zeros."""
    stop = start + target.shape[-1]
    low, high = max(0, start), min(x.shape[-1], stop)
    if low >= high:
        return [target.zero_]
    found: list[Operation] = [
        partial(target[..., low - start : high - start].copy_, x[..., low:high])
    ]
    if low > start:
        found.append(target[..., : low - start].zero_)
    if high < stop:
        found.append(target[..., high - start :].zero_)
    return found


class BandOperand:
    """The blocks of an input along one band, prepared on first use.

    Args:
        rows: The input.
        band: The blocks of its last dimension.
    """

    def __init__(self, rows: PaddedRows, band: Band) -> None:
        """Store the input."""
        self._rows, self.band, self.channels = rows, band, rows.channels
        self._made: dict[Remainders, list[Tensor]] = {}
        self._repeats = 1  # blocks that follow each other at each position
        self._products: Tensor | None = None

    def _blocks(self, remainders: Remainders) -> Iterator[Operation]:
        """Prepare the blocks ``[g, *t, (t n), (c w)]`` of the positions with these remainders.

        Those of depthwise convolutions are views, and products of a batch. Those of others
        follow each other along ``n``, so that there is one large product.
        """
        grid = self._rows.grid(remainders)
        if not are_views(grid.shape[0], self.channels):
            copied, copies = self._copied(grid, remainders)
            blocks = [copied]
        else:
            (padded, copies), left = self._rows.padded(remainders), self.band.axis.padding[0]
            starts = (self.band.start(block) + left for block in range(self.band.count))
            width = self.band.width
            blocks = [padded[..., start : start + width].flatten(-2) for start in starts]
        yield from copies
        self._repeats = blocks[0].shape[-2]
        self._made[remainders] = [block.flatten(-3, -2) for block in blocks]

    def _copied(self, x: Tensor, remainders: Remainders) -> tuple[Tensor, list[Operation]]:
        """Return memory for the blocks of ``x``, ``[g, *t, n, c, i]``, and the copies to it."""
        band = self.band
        shape = (*x.shape[:-3], band.count, *x.shape[-3:-1], band.width)
        blocks = self._rows.empty(shape, ("blocks", remainders))  # g *t b n c w
        copies = [
            copy
            for block, target in enumerate(blocks.unbind(-4))
            for copy in _copies(target, x, band.start(block))
        ]
        return blocks.flatten(-2).flatten(-3, -2), copies

    def products(self, key: Key, region: Region, alpha: float) -> Iterator[Operation]:
        """Yield the products ``[g, (c w), (c' w')]`` of the blocks in one region."""
        lefts, rights = tuple(lag.left for lag in key), tuple(lag.right for lag in key)
        for remainders in (lefts, rights):
            if remainders not in self._made:
                yield from self._blocks(remainders)
        if self._products is None:
            groups, width = self._made[lefts][0].shape[0], self.channels * self.band.width
            self._products = self._rows.empty((groups, width, width), ("products",))
        shifted = tuple((a + lag.shift, b + lag.shift) for (a, b), lag in zip(region, key))
        beta = 0.0
        for left, right in zip(self._made[lefts], self._made[rights]):
            columns, rows = self._rows_of(left, region), self._rows_of(right, shifted)
            if len(region) > 1:
                columns, copies = self._box(columns, region, "left")
                rows, others = self._box(rows, shifted, "right")
                yield from (*copies, *others)
            yield matmul(self._products, columns.mT, rows, beta, alpha)
            beta = 1.0

    def _rows_of(self, blocks: Tensor, ranges: Region) -> Tensor:
        """View the positions of a region along the last leading dimension."""
        start, stop = ranges[-1]
        return blocks.narrow(-2, start * self._repeats, (stop - start) * self._repeats)

    def _box(self, rows: Tensor, ranges: Region, use: str) -> tuple[Tensor, list[Operation]]:
        """Return the positions of a region in ``[g, *t, (t n), (c w)]``, as ``[g, r, (c w)]``."""
        outer: tuple[Any, ...] = (slice(None), *(slice(*edges) for edges in ranges[:-1]))
        return flattened(rows[outer], 1, -2, self._rows.scratch, use)

    def additions(self, total: Tensor, is_first: bool) -> Iterator[Operation]:
        """Yield the sums of the products to ``total``, ``[g, c, k, c', k']``, or added to it."""
        if self.channels > MOST_GATHERED_CHANNELS:  # a short sum of many is slow
            first, *others = self._each_term
            yield partial(total.copy_ if is_first else total.add_, first)
            for term in others:
                yield partial(total.add_, term)
        elif is_first:
            yield partial(torch.sum, self._terms, -1, out=total)
        else:
            yield partial(_add_sum_, total, self._terms)

    @cached_property
    def _terms(self) -> Tensor:
        """View the products of each output in a block, ``[g, c, k, c', k', o]``."""
        products = self._products
        assert products is not None
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
        return products.as_strided(sizes, strides, products.storage_offset())

    @cached_property
    def _each_term(self) -> tuple[Tensor, ...]:
        """View the products of each output."""
        return self._terms.unbind(-1)


def _add_sum_(total: Tensor, terms: Tensor) -> None:
    """Add the sum over the last dimension."""
    total.add_(terms.sum(-1))
