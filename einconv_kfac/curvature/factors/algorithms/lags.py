"""Lag reuse in all dimensions: one product of channels per lag and region.

See docs/factors.md for the derivation. The regions of the outermost dimension are ranges of
the flattened positions. In the other dimensions, the largest region results from a left
operand that is zero elsewhere; only the strips at the borders are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, product
from math import prod

from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, run
from einconv_kfac.curvature.devices.products import matmul
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.algorithms.lag_operands import (
    Grids,
    boxes_of,
    masked,
    rows_of,
)
from einconv_kfac.curvature.factors.algorithms.lag_shares import (
    Group,
    Share,
    axes_of,
    lag_chunks,
    lag_cost,
    lag_groups,
    lag_shares,
    share_seconds,
)
from einconv_kfac.curvature.factors.chunking import even_chunks
from einconv_kfac.curvature.factors.indices.lag_pairs import Key
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.channel_blocks import ChannelBlock
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Geometry

Sums = dict[Key, Tensor]
"""The products of each region of a lag, ``[*r, g, c, c']``."""


class LagProducts:
    """The products of some examples at some lags: operations on views and buffers made before.

    Args:
        grids: The positions of the examples.
        geometry: The convolution.
        alpha: Multiplier of the products.
    """

    def __init__(self, grids: Grids, geometry: Geometry, alpha: float) -> None:
        """Prepare no products yet."""
        self._grids, self._alpha, self.scratch = grids, alpha, Scratch()
        self.operations: list[Operation] = []

    def append(self, group: Group, sums: Sums | None) -> Iterator[tuple[Key, Tensor]]:
        """Append the products of some lags, and yield each lag with its sums.

        Args:
            group: The lags.
            sums: The sums to add to, made on first use. Without them, the sums of a lag are
                overwritten by those of the next one.
        """
        grid = self._grids[tuple(lag.left for lag in group[0])]
        left, masks = masked(grid, group[0][1:], self.scratch)
        self.operations += masks
        for key in group:
            right = self._grids[tuple(lag.right for lag in key)]
            shape = (*(len(lag.regions) for lag in key), len(left), left.shape[-1], left.shape[-1])
            if sums is None:
                total = self.scratch.empty(shape, left, "sums")
            else:
                total = sums[key] if key in sums else left.new_empty(shape)
                sums[key] = total
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
                here, there, copies = boxes_of(*grids, key, region, self.scratch)
                self.operations += copies
            self.operations.append(matmul(total[region], here.mT, there, beta, self._alpha))


class Factor:
    """A factor that is added by tasks, each for some of the lags.

    Args:
        geometry: The convolution, of at least two dimensions.
        shares: The lags of each task.
        update: The update of the factor.
    """

    def __init__(self, geometry: Geometry, shares: Sequence[Share], update: Update) -> None:
        """View the entries."""
        size = update.out.shape[-1] // prod(geometry.kernel_size)
        self._block = ChannelBlock(update, ((0, size), (0, size)), geometry)
        self._geometry, self._shares, self._update = geometry, shares, update

    def _grids(self, x: Tensor) -> Grids:
        """Return the positions of some examples."""
        return Grids(x, self._geometry, self._update.out.dtype)

    def _products(self, grids: Grids) -> LagProducts:
        """Return the products of one task and some examples; none yet."""
        return LagProducts(grids, self._geometry, self._update.alpha)

    def phases(self, parts: list[Tensor]) -> Iterator[list[list[Operation]]]:
        """Yield the operations of each task up to the points where tasks wait for each other."""
        count = len(self._shares)
        found = self._single(parts[0]) if len(parts) == 1 else self._several(parts)
        first = next(found)
        yield [[self._block.begin_, *first[0]], *first[1:]]
        yield from found
        yield [[partial(self._block.store_, i, count)] for i in range(count)]

    def _single(self, x: Tensor) -> Iterator[list[list[Operation]]]:
        """Yield the products of all examples, and the write of each lag after its products."""
        grids, found = self._grids(x), []
        for groups in self._shares:
            products = self._products(grids)
            for group in groups:
                for key, total in products.append(group, None):
                    products.operations += self._block.writing(key, total, products.scratch)
            found.append(products.operations)
        yield self._copies(grids, x)
        yield found

    def _several(self, parts: list[Tensor]) -> Iterator[list[list[Operation]]]:
        """Yield the products of some examples at a time, and all writes after them."""
        sums: list[Sums] = [{} for _ in self._shares]
        grids: dict[int, Grids] = {}
        found: dict[int, list[list[Operation]]] = {}
        for part in parts:
            size = len(part)
            if size not in found or not grids[size].are_copies:
                grids[size] = self._grids(part)
                found[size] = []
                for groups, own in zip(self._shares, sums):
                    products = self._products(grids[size])
                    for group in groups:
                        deque(products.append(group, own), 0)
                    found[size].append(products.operations)
            copies = self._copies(grids[size], part)
            if part is parts[0]:
                zeros = [[total.zero_ for total in own.values()] for own in sums]
                copies = [[*zero, *own] for zero, own in zip(zeros, copies)]
            yield copies
            yield found[size]
        yield [self._writes(own) for own in sums]

    def _writes(self, sums: Sums) -> list[Operation]:
        """Return the writes of all lags of a task."""
        scratch = Scratch()
        writes = (self._block.writing(key, total, scratch) for key, total in sums.items())
        return list(chain.from_iterable(writes))

    def _copies(self, grids: Grids, x: Tensor) -> list[list[Operation]]:
        """Return the copies of examples to the grids, some for each task."""
        copies, count = grids.copies(x), len(self._shares)
        return [copies[i::count] for i in range(count)]


class LagReuse(Algorithm):
    """Products of channels at each lag, which many entries of the factor share."""

    name = "lags"
    rank = 0
    reads_unmet = True

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        return lag_cost(problem, lag_groups(axes_of(problem)))

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from products that many entries share."""
        for phase in self._phases(x, problem, update):
            for operations in phase:
                run(operations)

    def task(self, x: Tensor, problem: Problem, update: Update) -> Task:
        """Return `add`, with its views and buffers prepared."""
        phases = list(self._phases(x, problem, update))
        return partial(run, [one for phase in phases for own in phase for one in own])

    def shares(self, problem: Problem, tasks: int) -> list[float]:
        """Return the parts of the work that tasks with some of the lags each have."""
        found = lag_shares(problem, tasks)
        work = [share_seconds(problem, groups) for groups in found]
        return [part / (sum(work) or 1.0) for part in work]

    def phases(self, x: Tensor, problem: Problem, update: Update) -> Iterator[list[Task]]:
        """Yield tasks with some of the lags each, up to the points where they wait."""
        for phase in self._phases(x, problem, update):
            yield [partial(run, operations) for operations in phase]

    def _phases(
        self, x: Tensor, problem: Problem, update: Update
    ) -> Iterator[list[list[Operation]]]:
        """Yield the operations of each task in each phase."""
        axes = axes_of(problem)
        x = x.unsqueeze(2) if x.ndim == 3 else x
        geometry = Geometry(axes, problem.geometry.groups)
        factor = Factor(geometry, lag_shares(problem, problem.shares), update)
        return factor.phases(list(even_chunks(x, lag_chunks(problem))))
