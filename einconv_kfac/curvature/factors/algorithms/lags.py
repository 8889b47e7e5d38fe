"""Lag reuse in all dimensions: one product of channels per lag and region.

See docs/factors.md for the derivation. The regions of the outermost dimension are ranges of
the flattened positions. In the other dimensions, the largest region results from a left
operand that is zero elsewhere; only the strips at the borders are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import groupby, product
from math import prod

from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, run
from einconv_kfac.curvature.devices.products import matmul
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    SCATTERED_ELEMENT_COPIES,
    Algorithm,
    Cost,
)
from einconv_kfac.curvature.factors.algorithms.lag_operands import (
    Grids,
    boxes_of,
    masked,
    rows_of,
)
from einconv_kfac.curvature.factors.chunking import chunk_count, chunks
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, all_lags, grid_size, half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.channel_blocks import (
    ChannelBlock,
    Pair,
    channel_pairs,
    edges,
)
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


class LagProducts:
    """The products of some examples at all lags: operations on views and buffers made before.

    Args:
        x: The examples, ``[n, c, *i]``.
        pairs: The pairs of blocks of channels.
        geometry: The convolution.
        update: The update of the factor.
    """

    def __init__(self, x: Tensor, pairs: list[Pair], geometry: Geometry, update: Update) -> None:
        """Prepare no products yet."""
        found = dict.fromkeys(edge for pair in pairs for edge in pair)
        self._grids = {edge: Grids(x, geometry, update.out.dtype, edge) for edge in found}
        self._alpha, self._axes, self._scratch = update.alpha, geometry.axes, Scratch()
        self.operations: list[Operation] = []

    @property
    def read_copies(self) -> bool:
        """Return whether all products read copies, to which other examples can be copied."""
        return all(grids.are_copies for grids in self._grids.values())

    def copies(self, x: Tensor) -> list[Operation]:
        """Return the copies of as many examples to where the products read them."""
        return [copy for grids in self._grids.values() for copy in grids.copies(x)]

    def append(self, pair: Pair, sums: Sums | None) -> Iterator[tuple[Key, Tensor]]:
        """Append the products between two blocks, and yield each lag with its sums.

        Args:
            pair: The blocks of channels.
            sums: The sums ``[*r, g, c, c']`` to add to, made on first use. Without them, the sums
                of a lag are overwritten by those of the next one.
        """
        sides = self._grids[pair[0]], self._grids[pair[1]]
        keys = half_of_lags(self._axes) if pair[0] == pair[1] else all_lags(self._axes)
        for (inner, remainder), group in groupby(keys, key=lambda key: (key[1:], key[0].left)):
            grid = sides[0][(remainder, *(lag.left for lag in inner))]
            left, masks = masked(grid, inner, self._scratch)
            self.operations += masks
            for key in group:
                right = sides[1][tuple(lag.right for lag in key)]
                regions = (len(lag.regions) for lag in key)
                shape = (*regions, left.shape[0], left.shape[-1], right.shape[-1])
                if sums is None:
                    total = self._scratch.empty(shape, left, "sums")
                else:
                    total = sums.get((pair, key))
                    if total is None:
                        total = sums[pair, key] = left.new_empty(shape)
                self._append_regions(key, left, (grid, right), total, float(sums is not None))
                yield key, total

    def _append_regions(
        self, key: Key, left: Tensor, grids: tuple[Tensor, Tensor], total: Tensor, beta: float
    ) -> None:
        """Append the products ``[g, c, c']`` of each region."""
        interior = tuple(lag.interior for lag in key[1:])
        for region in product(*(range(len(lag.regions)) for lag in key)):
            if region[1:] == interior:
                here, there = rows_of(left, grids[1], key, key[0].regions[region[0]])
            else:
                here, there, copies = boxes_of(*grids, key, region, self._scratch)
                self.operations += copies
            self.operations.append(matmul(total[region], here.mT, there, beta, self._alpha))


def _task(
    x: Tensor, pairs: list[Pair], geometry: Geometry, problem: Problem, update: Update
) -> Task:
    """Return the addition of the entries between some blocks, some examples at a time."""
    parts = list(chunks(x, _growth(problem), tasks=problem.tasks))
    blocks = {pair: ChannelBlock(update, pair, geometry) for pair in pairs}
    if len(parts) == 1:
        products = LagProducts(x, pairs, geometry, update)
        for pair, block in blocks.items():
            products.operations.append(block.begin_)
            for key, total in products.append(pair, None):
                products.operations.append(block.writing(key, total))
            products.operations.append(block.store_)
        return partial(run, [*products.copies(x), *products.operations])
    sums: Sums = {}
    operations: list[Operation] = []
    prepared: dict[int, LagProducts] = {}
    for part in parts:
        products = prepared.get(len(part))
        if products is None or not products.read_copies:
            products = prepared[len(part)] = LagProducts(part, pairs, geometry, update)
            for pair in pairs:
                deque(products.append(pair, sums), 0)
        operations += [*products.copies(part), *products.operations]
    zeros: list[Operation] = [total.zero_ for total in sums.values()]
    for pair, block in blocks.items():
        found = {key: total for (own, key), total in sums.items() if own == pair}
        writes = [block.writing(key, total) for key, total in found.items()]
        operations += [block.begin_, *writes, block.store_]
    return partial(run, [*zeros, *operations])


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
        self.task(x, problem, update)()

    def task(self, x: Tensor, problem: Problem, update: Update) -> Task:
        """Return `add`, with its views and buffers prepared."""
        x, geometry = _with_rows(x, problem.geometry)
        return _task(x, channel_pairs(problem), geometry, problem, update)

    def tasks(self, x: Tensor, problem: Problem, update: Update) -> list[Task]:
        """Return a task for each pair of blocks of channels."""
        x, geometry = _with_rows(x, problem.geometry)
        pairs = sorted(channel_pairs(problem), key=lambda pair: pair[0] == pair[1])
        return [_task(x, [pair], geometry, problem, update) for pair in pairs]


def _with_rows(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return at least two dimensions, since the outermost one has a part of its own."""
    if geometry.ndim > 1:
        return x, geometry
    return x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
