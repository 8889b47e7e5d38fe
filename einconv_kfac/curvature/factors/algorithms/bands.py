"""Lags along the leading dimensions and bands of products along the last, for few channels.

The last dimension is cut into blocks of outputs. One product per lag multiplies all positions
that the outputs of a block meet with each other, for all blocks and examples at once; the
factor's entries are partial sums along its diagonals. Bands need up to four times more
multiplications per output than lags. But their products are wide enough to be fast, and the last
dimension has no regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod

from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, run
from einconv_kfac.curvature.devices.products import WIDE_ROWS
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    Algorithm,
    Cost,
)
from einconv_kfac.curvature.factors.algorithms.band_operands import BandOperand, PaddedRows
from einconv_kfac.curvature.factors.algorithms.output_blocks import are_views, bands
from einconv_kfac.curvature.factors.chunking import chunk_count, chunk_size, chunks
from einconv_kfac.curvature.factors.indices.lag_pairs import half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.region_sums import (
    MOST_GATHERED_CHANNELS,
    regions_of,
    write_regions,
)
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis, Geometry

SMALL_PRODUCT_MAC_PRICE = 1.6
"""Price of a multiplication in single products with fewer than `WIDE_ROWS` rows and columns."""

NARROW_GAP_COPIES = 1.25
"""Price of reading positions with gaps in products of that width, in copies of them."""


def groups_at_once(problem: Problem, growth: float) -> int:
    """Return how many groups to process at a time: half of the input, or less."""
    limit = chunk_size(problem.device, problem.inputs // 2, problem.tasks) / growth
    return max(1, int(limit * problem.geometry.groups / problem.inputs))


def _operations(
    parts: list[Tensor], geometry: Geometry, update: Update, scratch: Scratch
) -> Iterator[Operation]:
    """Yield the products of some groups, of at least two dimensions, some examples at a time."""
    leading, last = geometry.axes[:-1], geometry.axes[-1]
    channels = parts[0].shape[1] // geometry.groups
    regions = regions_of(leading)
    shape = (len(regions), geometry.groups, *(channels, last.kernel_size) * 2)
    sums = scratch.empty(shape, update.out, "sums")
    is_first = True
    for part in parts:
        rows = PaddedRows(part, geometry, scratch, update.out.dtype)
        for band in bands(last, channels):
            operand = BandOperand(rows, band)
            for (key, region), total in zip(regions, sums):
                yield from operand.products(key, region, update.alpha)
                yield from operand.additions(total, is_first)
            is_first = False
    yield partial(write_regions, sums, leading, update)


def _growth(axis: Axis, channels: int) -> float:
    """Return how many times larger than its input the blocks of an axis are."""
    return sum(band.count * band.width for band in bands(axis, channels)) / axis.input_size


class Bands(Algorithm):
    """Products of blocks of positions along the last dimension."""

    name = "bands"
    rank = 2

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        *leading, last = problem.geometry.axes
        keys = half_of_lags(tuple(leading)) if leading else ((),)
        found = list(bands(last, problem.channels))
        rows = sum(
            prod(key[i].regions[-1][1] - key[i].regions[0][0] for i in range(len(key)))
            for key in keys
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
        if len(leading) > 1:  # positions with gaps: copied, also by oneDNN, or read one by one
            met = rows * sum(band.count * band.width for band in found)
            copies = 4.0 if width >= WIDE_ROWS else NARROW_GAP_COPIES
            copied += copies * problem.batch * groups * channels * met
        products = count * regions * (10 * len(found) + 4 * blocks)
        calls = products * (steps + BATCHED_MATRIX_CALLS * (groups - 1)) + 30 * steps * len(keys)
        along = 0.6 if channels <= MOST_GATHERED_CHANNELS else 0.42  # diagonals, but in order
        written = along * (problem.outputs + count * sums)
        price = problem.matmul_price() * problem.batch * groups
        price *= SMALL_PRODUCT_MAC_PRICE if groups == 1 and width < WIDE_ROWS else 1.0
        return Cost(macs * price, width, copied, written, calls)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from products of blocks of positions."""
        for operation in self._operations(x, problem, update):
            operation()

    def task(self, x: Tensor, problem: Problem, update: Update) -> Task:
        """Return `add`, with its views and buffers prepared."""
        return partial(run, list(self._operations(x, problem, update)))

    def _operations(self, x: Tensor, problem: Problem, update: Update) -> Iterator[Operation]:
        """Yield the operations of `add`."""
        geometry, c, scratch = problem.geometry, problem.channels, Scratch()
        if geometry.ndim == 1:  # no dimension to take lags along
            x, geometry = x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
        growth = _growth(geometry.axes[-1], c)
        step = groups_at_once(problem, growth)
        limit = chunk_size(problem.device, problem.inputs, problem.tasks)
        for start in range(0, geometry.groups, step):
            some = replace(geometry, groups=min(step, geometry.groups - start))
            parts = list(chunks(x[:, start * c : (start + some.groups) * c], growth, limit))
            out = update.out[start : start + some.groups]
            yield from _operations(parts, some, replace(update, out=out), scratch)
