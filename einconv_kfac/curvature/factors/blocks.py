"""Blocks of channels of a factor, collected where they are written row by row."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from math import prod

from torch import Tensor

from einconv_kfac.curvature.factors.assembly import store
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.update import Update, blocks_of, mirror_block_
from einconv_kfac.geometry import Geometry

Pair = tuple[tuple[int, int], tuple[int, int]]

ROWS = 1152
"""Rows of the factor in a block: what is written at a time should fit into a cache."""

NARROWEST = 32
"""Channels that a block has at least."""


class Block:
    """The entries between two blocks of channels, on their way to the factor.

    They are collected with the channels innermost, where products are written row by row, and
    interleaved with the kernel entries in one pass.

    Args:
        update: Where they go.
        pair: The blocks of channels.
        geometry: The convolution.
        memory: Where they are collected.
    """

    def __init__(self, update: Update, pair: Pair, geometry: Geometry, memory: Tensor) -> None:
        """Clear the memory: entries that no lag writes are zero."""
        kernel = geometry.kernel_size
        rows, columns = (stop - start for start, stop in pair)
        shape = (geometry.groups, rows, *kernel, *kernel, columns)
        entries = memory[: prod(shape)].zero_().view(shape)
        self.entries = entries.movedim(-1, 2 + len(kernel))  # g ci *k ci' *k'
        self._update, self._pair, self._size = update, pair, prod(kernel)

    def store_(self) -> None:
        """Update the factor's entries and their mirror images."""
        rows, columns = (slice(a * self._size, b * self._size) for a, b in self._pair)
        out, kernel = self._update.out, self.entries.shape[2 : self.entries.ndim // 2 + 1]
        store(blocks_of(out[:, rows, columns], kernel), self.entries, self._update.beta)
        if rows != columns:
            mirror_block_(out, rows, columns)


def block_memory(problem: Problem, like: Tensor) -> Tensor:
    """Return memory for the largest block, to be used again: fresh memory is slow."""
    largest = max(stop - start for start, stop in pairwise(edges(problem))) * problem.entries
    return like.new_empty(problem.geometry.groups * largest**2)


def edges(problem: Problem) -> list[int]:
    """Return the bounds of even blocks of channels."""
    count = max(1, round(problem.channels / max(NARROWEST, ROWS // problem.entries)))
    return [problem.channels * i // count for i in range(count + 1)]


def channel_pairs(problem: Problem) -> list[Pair]:
    """Return the pairs of blocks of channels, ``c <= c'``."""
    return list(combinations_with_replacement(pairwise(edges(problem)), 2))
