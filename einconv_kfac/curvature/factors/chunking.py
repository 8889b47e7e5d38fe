"""Chunks of an input: as many examples at a time as fit a cache, or occupy a device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.problem import Problem

UNDIVIDED_ELEMENTS = 1 << 18
"""Elements of an input that is processed as a whole, since calls would cost more."""


def chunk_size(device: str, elements: int, tasks: int = 1) -> int:
    """Return how many elements to process at a time.

    Args:
        device: The type of the device.
        elements: The elements of the input, or of a task's part of it.
        tasks: Number of tasks at the same time; together they process no more than one would.
    """
    return max(1, profile_of(device).chunk_elements(elements * tasks) // tasks)


def chunk_count(problem: Problem, growth: float, limit: int | None = None) -> int:
    """Return the number of chunks into which `chunks` cuts the input."""
    limit = chunk_size(problem.device, problem.inputs, problem.tasks) if limit is None else limit
    per_example = max(1.0, growth * problem.inputs / problem.batch)
    return -(-problem.batch // max(1, int(limit / per_example)))


def chunks(x: Tensor, growth: float, limit: int | None = None, tasks: int = 1) -> Iterator[Tensor]:
    """Cut ``x`` along its first dimension.

    Args:
        x: The input, with the examples first.
        growth: How many times larger than ``x`` its processed form is.
        limit: Elements of a processed chunk, which has at least one example; by default those
            of `chunk_size`.
        tasks: Number of tasks at the same time, as in `chunk_size`.
    """
    limit = chunk_size(x.device.type, x.numel(), tasks) if limit is None else limit
    most = max(1, int(limit / max(1.0, growth * x[0].numel())))
    return even_chunks(x, -(-x.shape[0] // most))


def even_chunks(x: Tensor, count: int) -> Iterator[Tensor]:
    """Cut ``x`` along its first dimension into so many chunks, or fewer, of even size."""
    step = -(-x.shape[0] // count)
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def examples_per_chunk(x: Tensor, growth: float, tasks: int = 1) -> int:
    """Return how many examples of ``x`` to process at a time, at least two."""
    limit = max(UNDIVIDED_ELEMENTS // tasks, chunk_size(x.device.type, x.numel(), tasks) / growth)
    return max(2, int(limit / max(1, x[0].numel())))
