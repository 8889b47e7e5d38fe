"""Unfold and multiply, some examples at a time, on the upper block triangle only."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor

from einconv_kfac.curvature.devices.products import operand_dtype
from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    Algorithm,
    Cost,
)
from einconv_kfac.curvature.factors.chunking import chunk_count, chunk_size, chunks
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.update import (
    Update,
    panels,
    threads_for_panels,
)
from einconv_kfac.curvature.factors.unfold import unfolded

ROW_COPY_ELEMENTS = 8
"""Price of copying a row, in elements, beside that of its elements."""

GROUPED_COPY_PRICE = 1.4
"""Price of copying for batches of small products, relative to that for a single one."""

ADDED_CHUNK_PRICE = 0.2
"""Price of adding the product of one more chunk to an entry, relative to writing the entry."""


def _growth(problem: Problem) -> float:
    """Return how many times larger than the input the unfolded input is."""
    geometry = problem.geometry
    return problem.entries * geometry.positions / prod(geometry.input_size)


def _limit(problem: Problem) -> int:
    """Return the elements to unfold at a time: few where adding up products costs little."""
    share = 2 if problem.outputs <= problem.inputs else 1
    return chunk_size(problem.device, problem.inputs // share, problem.tasks)


class Im2col(Algorithm):
    """The product of the unfolded input with its transpose."""

    name = "im2col"
    rank = 5

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        bounds = panels(problem.size, problem.device)
        pairs = sum((stop - start) * (problem.size - start) for start, stop in pairwise(bounds))
        columns = problem.batch * problem.geometry.positions * problem.geometry.groups
        count = chunk_count(problem, _growth(problem), _limit(problem))
        calls = count * (5 + len(bounds)) * (
            1 + BATCHED_MATRIX_CALLS * problem.geometry.groups
        ) + 4 * len(bounds)
        short = 1.1 + ROW_COPY_ELEMENTS / problem.geometry.output_size[-1]
        copied = (
            problem.size
            * columns
            * short
            * (GROUPED_COPY_PRICE if problem.geometry.groups > 1 else 1.0)
        )
        written = (1.2 + ADDED_CHUNK_PRICE * (count - 1)) * problem.outputs
        waits = 2 * count  # for the unfolded input, and for its product
        macs = pairs * columns
        return Cost(macs, problem.size, copied, written, calls, is_mixed=True, waits=waits)

    def sharing(self, problem: Problem) -> float:
        """Return how many threads share the panels of a product."""
        return threads_for_panels(problem.size, problem.threads)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, with ``a`` the columns of the unfolded input."""
        geometry = problem.geometry
        dtype = operand_dtype(x, update.out.dtype)
        parts = list(chunks(x, _growth(problem), _limit(problem)))
        for part in parts:
            columns = unfolded(part.to(dtype), geometry, problem.threads)
            update.add_product_(columns, last=part is parts[-1])
            del columns  # freed before the next ones are computed
            update = update.added()
