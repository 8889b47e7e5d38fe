"""Blocks of channels of a factor, in which products are collected row by row."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement, pairwise
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch
from einconv_kfac.curvature.factors.indices.lag_pairs import lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.scatter import Key, writing
from einconv_kfac.curvature.factors.symmetric.update import Update, copy_transposed_block_
from einconv_kfac.geometry import Axis, Geometry

Pair = tuple[tuple[int, int], tuple[int, int]]

BLOCK_ROWS = 1152
"""Rows of the factor in a block, so that the entries written at a time fit a cache."""

FEWEST_BLOCK_CHANNELS = 32
"""Smallest number of channels of a block."""

INTERLEAVED_ELEMENTS = 1 << 16
"""Number of elements that are interleaved at a time."""


class ChannelBlock:
    """The entries of the factor between two blocks of channels, collected in the factor itself.

    Between `begin_` and `store_` the channels are innermost in each row, so that a product is
    written by one copy. Then they are interleaved with the kernel entries, a few rows at a time.

    Args:
        update: The update of the factor.
        pair: The blocks of channels.
        geometry: The convolution.
    """

    def __init__(self, update: Update, pair: Pair, geometry: Geometry) -> None:
        """View the entries."""
        kernel, self._out = geometry.kernel_size, update.out
        self._size, d = prod(kernel), len(kernel)
        self._rows, self._columns = (slice(a * self._size, b * self._size) for a, b in pair)
        self.beta, self._old = float(update.beta != 0), update.beta  # the multiplier for each write
        self._is_filled = all_are_written(geometry.axes)
        part = self._part
        entries = torch.unflatten(torch.unflatten(part, 2, (*kernel, -1)), 1, (-1, *kernel))
        self.entries = entries.movedim(-1, 2 + d)  # g ci *k ci' *k'

    @property
    def _part(self) -> Tensor:
        """The entries, ``[g, (ci k), (ci' k')]``."""
        return self._out[:, self._rows, self._columns]

    def begin_(self) -> None:
        """Scale the old values, or set to zero the entries that no lag writes."""
        if self.beta:
            _interleave_(self._part.mul_(self._old), self._size)
        elif not self._is_filled:
            self._part.zero_()

    def writing(self, key: Key, sums: Tensor, scratch: Scratch) -> list[Operation]:
        """Return the writes of a lag's sums over regions, ``[*r, g, c, c']``."""
        is_diagonal = self._rows == self._columns
        return writing(self.entries, key, sums, self.beta, scratch, is_diagonal)

    def store_(self, share: int = 0, shares: int = 1) -> None:
        """Bring the entries into order, and copy their transpose to the lower triangle.

        Args:
            share: The number of a part of the rows; blocks off the diagonal are one part.
            shares: Number of parts that are stored by calls of their own.
        """
        part = self._part
        rows = part.shape[1]
        own = part[:, rows * share // shares : rows * (share + 1) // shares]
        _interleave_(own, part.shape[2] // self._size)
        if self._rows != self._columns:
            copy_transposed_block_(self._out, self._rows, self._columns)


@lru_cache(maxsize=1024)
def all_are_written(axes: tuple[Axis, ...]) -> bool:
    """Return whether every pair of kernel entries meets some pair of positions."""
    windows = [[window for lag in lags(axis) for window in lag.windows] for axis in axes]
    return all(
        len(found) == axis.kernel_size**2 and all(first < end for first, end in found)
        for axis, found in zip(axes, windows)
    )


def _interleave_(part: Tensor, inner: int) -> None:
    """Transpose each row of ``part``, ``[g, r, (outer inner)]``, to ``[g, r, (inner outer)]``."""
    if not 1 < inner < part.shape[2]:
        return
    rows = max(1, INTERLEAVED_ELEMENTS // part.shape[2])
    order = torch.arange(part.shape[2], device=part.device).view(-1, inner).T.flatten()
    for matrix in part:
        for strip in matrix.split(rows):
            strip.copy_(strip.index_select(1, order))  # a gather is faster than a transposed copy


def edges(problem: Problem) -> list[int]:
    """Return the bounds of even blocks of channels."""
    channels = max(FEWEST_BLOCK_CHANNELS, BLOCK_ROWS // problem.entries)
    count = max(_blocks_of(problem), round(problem.channels / channels))
    return [problem.channels * i // count for i in range(count + 1)]


def _blocks_of(problem: Problem) -> int:
    """Return the number of blocks whose pairs occupy all shares; none is too small."""
    most = max(1, problem.channels // FEWEST_BLOCK_CHANNELS)
    shares = problem.shares
    return min(most, next(b for b in range(1, shares + 2) if b * b >= 2 * shares or shares == 1))


def channel_pairs(problem: Problem) -> list[Pair]:
    """Return the pairs of blocks of channels, ``c <= c'``."""
    return list(combinations_with_replacement(pairwise(edges(problem)), 2))
