"""Correlations of the input with itself, by the weight gradient of a convolution.

The weight gradient of a convolution whose output gradient is the left operand holds the
products at all distances of a kernel of lags. One call of that routine computes the sums of one
region of the left positions; see docs/factors.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Scratch, run
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.channels_last import channels_last
from einconv_kfac.curvature.factors.chunking import examples_per_chunk
from einconv_kfac.curvature.factors.indices.correlation_calls import Call, Range, Spans, calls
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.channel_blocks import (
    ChannelBlock,
    Pair,
    channel_pairs,
    edges,
)
from einconv_kfac.curvature.factors.symmetric.scatter import Key
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis, Geometry

FINE_POSITIONS_PER_CHANNEL = 16
"""Positions per channel up to which products, and not operands, cost most to move."""

REGION_MAC_PRICE = 1.8
"""Price of a multiplication, on average over large and small regions."""

DOUBLE_MAC_PRICE = 8.0
"""Price of a multiplication in float64, for which oneDNN has no weight gradient."""

FULL_SPEED_CHANNELS = 56
"""Channels of a group from which the routine is at full speed."""

JOINT_CHANNELS = 16
"""Channels of a group that the routine computes together, even if there are fewer."""

SEPARATE_GROUP_MAC_PRICE = 3.0
"""Price of a multiplication where groups with fewer channels are computed one by one."""

CALLS_PER_GRADIENT = 100
"""Calls that one weight gradient costs, with its copies and sums."""

SUMS_PER_INPUT = 4
"""The sums of all regions are in memory together if so many of them fit into the input."""

OPERAND_COPIES = 4.0
"""Copies of a chunk of the input in memory: channels last, and both operands."""


def _rounds(found: tuple[Call, ...], problem: Problem) -> list[list[Call]]:
    """Return the calls whose sums are held at the same time: all, if these are small."""
    by_spans = [list(calls) for _, calls in groupby(found, key=lambda call: call.spans)]
    sums = sum(prod(calls[0].shape) for calls in by_spans) * _block_size(problem)
    return [list(found)] if SUMS_PER_INPUT * sums <= problem.inputs else by_spans


def _block_size(problem: Problem) -> int:
    """Return the products between two blocks of channels at one lag."""
    bounds = edges(problem)
    return problem.geometry.groups * (bounds[1] - bounds[0]) ** 2


@lru_cache(maxsize=1024)
def _keys(combined: Spans) -> tuple[tuple[tuple[int, ...], Key], ...]:
    """Return the lags of some spans, and where each is among their distances."""
    return tuple(
        (index, tuple(span.pairs(span.distances[i]) for span, i in zip(combined, index)))
        for index in product(*(range(len(span.distances)) for span in combined))
    )


def _is_fine(problem: Problem) -> bool:
    """Return whether few regions are better than few calls."""
    positions = problem.batch * prod(problem.geometry.input_size)
    return positions < FINE_POSITIONS_PER_CHANNEL * problem.channels


def _all_sums(
    operands: list[Tensor], step: int, found: list[Call], geometry: Geometry, update: Update
) -> dict[Spans, Tensor]:
    """Return the correlations ``[*r, *lag, g, c, c']`` of two blocks of channels.

    Those of small regions are computed for all examples at once, those of the largest for
    ``step`` at a time.
    """
    first, dtype = operands[0], update.out.dtype
    sums: dict[Spans, Tensor] = {}
    for call in found:
        if call.spans not in sums:
            shape = (*call.shape, *first.shape[-2:], operands[-1].shape[-1])
            sums[call.spans] = first.new_zeros(shape, dtype=dtype)
        if not call.is_interior:
            _add_correlations_(sums[call.spans], call, operands, geometry, update)
    for start in range(0, len(first), step):
        parts = [channels_last(operand[start : start + step], dtype) for operand in operands]
        for call in found:
            if call.is_interior:
                _add_correlations_(sums[call.spans], call, parts, geometry, update)
        del parts  # freed before the next ones are computed
    return sums


def _add_correlations_(
    total: Tensor, call: Call, operands: list[Tensor], geometry: Geometry, update: Update
) -> None:
    """Add the correlations of one region to ``total``, of shape ``[*r, *lag, g, c, c']``.

    Args:
        total: What to add to.
        call: The region and its lags.
        operands: The blocks of channels, ``[n, *i, g, c]``, or one for both.
        geometry: The convolution.
        update: What to multiply with, and the dtype.
    """
    left = _box(operands[0], call.left, total.dtype)
    right = _box(operands[-1], call.right, total.dtype)
    if prod(call.lags) == 1 and left.shape[1:-2] == right.shape[1:-2]:
        here, there = (x.flatten(0, -3).movedim(1, 0) for x in (left, right))  # g t c
        products = here.mT @ there
        total[call.slot].view_as(products).add_(products, alpha=update.alpha)
        return
    found = _weight_gradient(left, right, call.lags, geometry)
    found = torch.unflatten(found, 0, (geometry.groups, -1)).movedim((0, 1, 2), (-3, -2, -1))
    total[call.slot].add_(found, alpha=update.alpha)


def _box(x: Tensor, ranges: tuple[Range, ...], dtype: torch.dtype) -> Tensor:
    """Copy a box of ``x``, ``[n, *i, g, c]``, with zeros where it leaves ``x``."""
    sizes = x.shape[1:-2]
    inside: tuple[Any, ...] = tuple(
        slice(max(0, start), min(size, stop), step)
        for (start, stop, step), size in zip(ranges, sizes)
    )
    part = x[(slice(None), *inside)]
    lengths = [-(-(stop - start) // step) for start, stop, step in ranges]
    shape = (len(x), *lengths, *x.shape[-2:])
    if part.shape == shape:
        box = channels_last(part, dtype)
    else:
        box = x.new_zeros(shape, dtype=dtype)
        there = (slice(max(0, -a), min(size, b) - a) for (a, b, _), size in zip(ranges, sizes))
        box[(slice(None), *there)] = part
    return box


def _weight_gradient(
    left: Tensor, right: Tensor, lags: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """Return ``sum_{n,t} left[n, t, g, c] right[n, t S + l D, g, c']`` as ``[(g c), c', *l]``."""
    left, right = left.flatten(-2).movedim(-1, 1), right.flatten(-2).movedim(-1, 1)
    sizes = (left.shape[1], *lags, right.shape[1] // geometry.groups)
    weight = left.new_empty(sizes).movedim(-1, 1)  # of the operands' format, not to be copied
    zero = [0] * geometry.ndim
    found: Tensor = torch.ops.aten.convolution_backward(
        left, right, weight, None, geometry.stride, zero, geometry.dilation, False, zero,
        geometry.groups, [False, True, False],
    )[1]  # fmt: skip
    return found


class Correlations(Algorithm):
    """Correlations of the input with itself, as weight gradients of a convolution."""

    name = "correlations"
    rank = 1

    def applies(self, problem: Problem) -> bool:
        """Return whether torch has an exact weight gradient of as many dimensions."""
        return problem.profile.has_exact_weight_gradients and problem.geometry.ndim <= 3

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        axes = problem.geometry.axes
        axes = (Axis(1, 1), *axes) if len(axes) == 1 else axes
        groups, channels = problem.geometry.groups, problem.channels
        blocks = len(edges(problem)) - 1
        found = calls(axes, True, _is_fine(problem))
        rows = sum(call.positions * prod(call.lags) for call in found)
        products = sum(prod(call.lags) for call in found)
        slow = (
            DOUBLE_MAC_PRICE
            if problem.dtype == torch.float64
            else max(1.0, FULL_SPEED_CHANNELS / channels)
        )
        slow *= SEPARATE_GROUP_MAC_PRICE if groups > 1 and channels < JOINT_CHANNELS else 1.0
        macs = REGION_MAC_PRICE * slow * rows * problem.batch * groups * channels**2
        copied = problem.inputs * OPERAND_COPIES * blocks
        written = (problem.outputs + products * groups * channels**2) / 3  # mostly whole rows
        return Cost(macs, channels, copied, written, CALLS_PER_GRADIENT * len(found) * blocks**2)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from correlations of the input with itself."""
        for phase in self.phases(x, problem, update):
            for task in phase:
                task()

    def shares(self, problem: Problem, tasks: int) -> list[float]:
        """Return the parts of the work of pairs of blocks of channels."""
        pairs = channel_pairs(replace(problem, shares=tasks))
        work = [1 + (first != second) for first, second in pairs]
        return [part / sum(work) for part in work]

    def phases(self, x: Tensor, problem: Problem, update: Update) -> Iterator[list[Task]]:
        """Yield the tasks, one for each pair of blocks of channels."""
        geometry = problem.geometry
        if geometry.ndim == 1:
            x, geometry = x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
        x = x.reshape(x.shape[0], geometry.groups, problem.channels, *x.shape[2:])
        x = x.movedim((1, 2), (-2, -1))  # n *i g c
        pairs = sorted(channel_pairs(problem), key=lambda pair: pair[0] == pair[1])
        yield [partial(_add_pair_, x, pair, geometry, problem, update) for pair in pairs]


def _add_pair_(x: Tensor, pair: Pair, geometry: Geometry, problem: Problem, update: Update) -> None:
    """Add the entries between two blocks of channels of ``x``, ``[n, *i, g, c]``."""
    block, diagonal = ChannelBlock(update, pair, geometry), pair[0] == pair[1]
    block.begin_()
    scratch = Scratch()
    operands = [x[..., slice(*edge)] for edge in dict.fromkeys(pair)]
    step = examples_per_chunk(operands[0], OPERAND_COPIES, problem.tasks)
    if step >= len(x):
        operands = [channels_last(operand, update.out.dtype) for operand in operands]
    for found in _rounds(calls(geometry.axes, diagonal, _is_fine(problem)), problem):
        sums = _all_sums(operands, step, found, geometry, update)
        for combined, total in sums.items():
            for index, key in _keys(combined):
                regions = total[(slice(None),) * len(key) + index]
                if not any(lag.distance for lag in key):
                    regions = regions.contiguous()  # made symmetric in place
                run(block.writing(key, regions, scratch))
        del sums  # freed before the next ones are computed
    block.store_()
