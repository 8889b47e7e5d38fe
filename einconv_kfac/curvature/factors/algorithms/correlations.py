"""Correlations of the input with itself, by the weight gradient of a convolution.

The weight gradient of a convolution whose output gradient is the left operand holds the
products at all distances of a kernel of lags. One call of that routine computes the sums of one
region of the left positions; see docs/factors.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, groupby, product
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch, run
from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.algorithms.correlation_products import CorrelationProducts
from einconv_kfac.curvature.factors.chunking import examples_per_chunk
from einconv_kfac.curvature.factors.indices.correlation_calls import Call, Spans, calls
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
        scratch = Scratch()
        for pair in channel_pairs(problem):
            run([*_operations(x, pair, problem, update, scratch)])

    def task(self, x: Tensor, problem: Problem, update: Update) -> Task:
        """Return `add`, with its views and buffers prepared."""
        return _task(x, channel_pairs(problem), problem, update)

    def shares(self, problem: Problem, tasks: int) -> list[float]:
        """Return the parts of the work of tasks with some pairs of blocks of channels each."""
        found = _shares(replace(problem, shares=tasks))
        work = [sum(map(_work, pairs)) for pairs in found]
        return [part / sum(work) for part in work]

    def phases(self, x: Tensor, problem: Problem, update: Update) -> Iterator[list[Task]]:
        """Yield tasks with some pairs of blocks of channels each."""
        yield [_task(x, pairs, problem, update) for pairs in _shares(problem)]


def _work(pair: Pair) -> int:
    """Return the products between two blocks of channels, in those of a block with itself."""
    return 1 + (pair[0] != pair[1])


def _shares(problem: Problem) -> list[list[Pair]]:
    """Divide the pairs of blocks of channels into shares with about as much work."""
    shares: list[list[Pair]] = [[] for _ in range(problem.shares)]
    for pair in sorted(channel_pairs(problem), key=_work, reverse=True):
        min(shares, key=lambda own: sum(map(_work, own))).append(pair)
    return [own for own in shares if own]


def _task(x: Tensor, pairs: Sequence[Pair], problem: Problem, update: Update) -> Task:
    """Return a task that adds the entries between some blocks of channels, all prepared."""
    scratch = Scratch()
    parts = (_operations(x, pair, problem, update, scratch) for pair in pairs)
    return partial(run, [*chain.from_iterable(parts)])


def _operations(
    x: Tensor, pair: Pair, problem: Problem, update: Update, scratch: Scratch
) -> Iterator[Operation]:
    """Yield the operations that add the entries between two blocks of channels of ``x``."""
    geometry = problem.geometry
    if geometry.ndim == 1:
        x, geometry = x.unsqueeze(2), Geometry((Axis(1, 1), *geometry.axes), geometry.groups)
    x = x.reshape(x.shape[0], geometry.groups, problem.channels, *x.shape[2:])
    x = x.movedim((1, 2), (-2, -1))  # n *i g c
    block, diagonal = ChannelBlock(update, pair, geometry), pair[0] == pair[1]
    operands = [x[..., slice(*edge)] for edge in dict.fromkeys(pair)]
    step = examples_per_chunk(operands[0], OPERAND_COPIES, problem.tasks)
    products = CorrelationProducts(operands, step, geometry, update, scratch)
    every = calls(geometry.axes, diagonal, _is_fine(problem))
    products.reserve(every)
    yield from (block.begin_, *products.begin)
    for found in _rounds(every, problem):
        sums = products.sums(found)
        yield from products.operations(found, sums)
        for combined, total in sums.items():
            for index, key in _keys(combined):
                regions = total[(slice(None),) * len(key) + index]
                if not any(lag.distance for lag in key):  # made symmetric in place
                    copy = scratch.empty(regions.shape, regions, "symmetric")
                    yield partial(copy.copy_, regions)
                    regions = copy
                yield from block.writing(key, regions, scratch)
    yield block.store_
