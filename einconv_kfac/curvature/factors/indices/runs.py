"""Partitions of an axis into cells of positions that meet the same kernel entries.

Position ``i`` meets the entries ``{k : i = o S + k D - left for some o}``. Away from the borders
that set depends on ``i`` modulo ``S`` alone. So an axis consists of a few *runs*, in which
positions at distance ``S`` meet the same entries, and of single positions between them. A cell
has the positions of a run with the same remainder. The sums over cells, times a small 0/1 matrix,
are the sums over the window of each kernel entry.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from math import prod

from einconv_kfac.geometry import Axis

FEWEST_SUMMED_PERIODS = 4
"""Periods of the shortest run that is summed; shorter ones are copied."""

VECTOR_ELEMENTS = 64
"""Contiguous elements from which additions of vectors reach full speed."""

CALL_NANOSECONDS = 15_000.0
"""Nanoseconds to start an operation."""

SHARED_MATRIX_ELEMENTS = 1 << 15
"""Largest number of elements of a matrix for several axes together."""


@dataclass(frozen=True)
class Run:
    """Positions ``start`` to ``stop`` of an axis, which form one or several cells.

    Args:
        start: The first position.
        stop: The end.
        period: Distance of the positions that are summed; ``stop - start`` if none are.
        kept: The positions of the first period that any kernel entry meets, from ``start``.
    """

    start: int
    stop: int
    period: int
    kept: tuple[int, ...]

    @property
    def is_summed(self) -> bool:
        """Whether there is more than one period."""
        return self.stop - self.start > self.period

    @property
    def is_complete(self) -> bool:
        """Whether no position is left out."""
        return len(self.kept) == self.period


@dataclass(frozen=True)
class AxisPartition:
    """An axis as cells, whose positions are summed first.

    Args:
        runs: The runs.
        entries: For each cell, the kernel entries that meet it.
        size: The number of positions, with those that are in no run.
    """

    runs: tuple[Run, ...]
    entries: tuple[tuple[int, ...], ...]
    size: int

    @property
    def is_finest(self) -> bool:
        """Whether each position is a cell of its own."""
        return len(self.entries) == self.size


@lru_cache(maxsize=1024)
def unmet(entries: tuple[tuple[int, ...], ...]) -> tuple[slice, ...]:
    """Return slices of the positions or cells that no kernel entry meets.

    Args:
        entries: The kernel entries that meet each of them.

    >>> unmet(((0,), (), (0,), (), ()))
    (slice(1, 4, 2), slice(4, 5, 1))
    """
    found: list[slice] = []
    left = [i for i, met in enumerate(entries) if not met]
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = next((n for n, i in enumerate(left) if i != left[0] + n * step), len(left))
        found.append(slice(left[0], left[count - 1] + 1, step))
        left = left[count:]
    return tuple(found)


def met_entries(axis: Axis, transposed: bool) -> tuple[tuple[int, ...], ...]:
    """Return the kernel entries that meet each position.

    Args:
        axis: The axis.
        transposed: Whether positions are those of the convolution's output, which a transposed
            convolution has as its input.

    >>> met_entries(Axis(4, 3, padding=(1, 1)), transposed=False)
    ((0, 1), (0, 1, 2), (0, 1, 2), (1, 2))
    """
    found: list[list[int]] = [
        [] for _ in range(axis.output_size if transposed else axis.input_size)
    ]
    for k in range(axis.kernel_size):
        for o in axis.outputs(k):
            found[o if transposed else axis.input_position(k, o)].append(k)
    return tuple(map(tuple, found))


@lru_cache(maxsize=1024)
def finest_partition(axis: Axis, transposed: bool) -> AxisPartition:
    """Return the axis with a cell for each position."""
    entries = met_entries(axis, transposed)
    size = len(entries)
    return AxisPartition((Run(0, size, size, tuple(range(size))),), entries, size)


@lru_cache(maxsize=1024)
def partition_by_runs(axis: Axis, transposed: bool, innermost: bool) -> AxisPartition:
    """Return the axis with a cell for each run and remainder.

    Args:
        axis: The axis.
        transposed: See `met_entries`.
        innermost: Whether adjacent positions are adjacent in memory. The period is then a
            multiple of the stride, so that whole vectors are added.
    """
    met = met_entries(axis, transposed)
    step = 1 if transposed else axis.stride
    period = step * -(-VECTOR_ELEMENTS // step) if innermost and step > 1 else step
    bounds: list[tuple[int, int, int]] = []
    for start, stop in _periodic(met, period):
        if stop - start >= FEWEST_SUMMED_PERIODS * period:
            bounds.append((start, stop, period))
        elif bounds and bounds[-1][1] - bounds[-1][0] == bounds[-1][2]:
            first = bounds.pop()[0]
            bounds.append((first, stop, stop - first))
        else:
            bounds.append((start, stop, stop - start))
    runs = []
    for start, stop, distance in bounds:
        kept = tuple(i for i in range(distance) if met[start + i])
        whole = tuple(range(distance)) if distance == stop - start else kept
        runs.append(Run(start, stop, distance, whole))
    entries = [met[run.start + i] for run in runs for i in run.kept]
    return AxisPartition(tuple(run for run in runs if run.kept), tuple(entries), len(met))


def _periodic(met: tuple[tuple[int, ...], ...], period: int) -> Iterator[tuple[int, int]]:
    """Yield the longest ranges of whole periods with equal entries, from left to right."""
    start = 0
    while start < len(met):
        stop = min(start + period, len(met))
        while stop < len(met) and met[stop] == met[stop - period]:
            stop += 1
        whole = (stop - start) // period * period
        stop = start + whole if whole else stop
        yield start, stop
        start = stop


@lru_cache(maxsize=1024)
def partitions(axes: tuple[Axis, ...], transposed: bool, items: int) -> tuple[AxisPartition, ...]:
    """Return a partition per axis: by runs where summing them first is cheaper, else the finest.

    Args:
        axes: The axes.
        transposed: See `met_entries`.
        items: Number of images, examples times channels.
    """
    entries = prod(axis.kernel_size for axis in axes)
    found = [finest_partition(axis, transposed) for axis in axes]
    for dim, axis in enumerate(axes):
        rest = prod(len(partition.entries) for partition in found[dim + 1 :])
        before = prod(len(partition.entries) for partition in found[:dim])
        runs = partition_by_runs(axis, transposed, dim == len(axes) - 1)
        size, left = (before * len(p.entries) * rest for p in (found[dim], runs))
        calls = CALL_NANOSECONDS * sum(map(_calls, runs.runs)) / items
        sums = size * (0.35 if rest == 1 or rest >= 14 else 0.7) + 30 * before + calls
        if sums + left * _product(entries) < size * _product(entries):
            found[dim] = runs
    return tuple(found)


def _product(entries: int) -> float:
    """Return the nanoseconds per input element of a product with few columns."""
    return 0.25 + 0.025 * entries


def _calls(run: Run) -> int:
    """Return the number of operations that sum the cells of a run."""
    return 1 if run.is_complete else len(run.kept)


@lru_cache(maxsize=256)
def incidence_matrices(
    axes: tuple[Axis, ...], transposed: bool, items: int, typecode: str
) -> tuple[array[float], ...]:
    """Return the matrices ``[k, cell]`` that are 1 where a kernel entry meets a cell, by rows.

    Args:
        axes: See `partitions`, as for the arguments that follow.
        transposed: See `partitions`.
        items: See `partitions`.
        typecode: Type of the elements, as in `array`.

    Returns:
        One matrix for all axes together, or, if that is large, one for all but the last and one
        for the last.
    """
    cells = partitions(axes, transposed, items)
    factors = [_incidence_matrix(p, axis.kernel_size) for p, axis in zip(cells, axes)]
    if shares_one_product(axes, transposed, items):
        parts = [reduce(_kron, factors)]
    else:
        parts = [reduce(_kron, factors[:-1]), factors[-1]]
    return tuple(array(typecode, chain.from_iterable(part)) for part in parts)


@lru_cache(maxsize=1024)
def shares_one_product(axes: tuple[Axis, ...], transposed: bool, items: int) -> bool:
    """Return whether one matrix for all axes together is small enough."""
    cells = partitions(axes, transposed, items)
    sizes = (len(p.entries) * axis.kernel_size for p, axis in zip(cells, axes))
    return len(axes) == 1 or prod(sizes) <= SHARED_MATRIX_ELEMENTS


def _incidence_matrix(partition: AxisPartition, kernel: int) -> list[list[int]]:
    """Return the rows ``[k, cell]`` of the matrix of one axis."""
    return [[int(k in met) for met in partition.entries] for k in range(kernel)]


def _kron(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    """Return the Kronecker product of two matrices, as rows."""
    return [[a * b for a in above for b in below] for above in left for below in right]
