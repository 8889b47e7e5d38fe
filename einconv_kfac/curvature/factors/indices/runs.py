"""Which positions of an axis are met by the same kernel entries, and may be summed first.

Position ``i`` is met by the entries ``{k : i = o S + k D - left for some o}``. Away from the
borders that set depends on ``i`` modulo ``S`` alone. So an axis is a few *runs*: ranges in which
positions ``S`` apart meet the same entries, and single positions between them. The sum over each
run and remainder, times a small 0/1 matrix, is the sum over the window of each kernel entry.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from math import prod

from einconv_kfac.geometry import Axis

PERIODS = 4
"""Periods from which a run is summed; shorter ones are copied."""

LANES = 64
"""Neighbouring elements that are added as vectors at full speed."""

START = 15_000.0
"""Nanoseconds to start an operation."""

LARGEST = 1 << 15
"""Elements of the largest matrix that several axes share."""


@dataclass(frozen=True)
class Run:
    """Positions ``start`` to ``stop`` of an axis, as one or several sums.

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
class Pieces:
    """An axis as sums over its runs.

    Args:
        runs: The runs.
        entries: For each piece, the kernel entries that meet it.
    """

    runs: tuple[Run, ...]
    entries: tuple[tuple[int, ...], ...]

    @property
    def are_positions(self) -> bool:
        """Whether each position is a piece of its own."""
        return len(self.runs) == 1 and self.runs[0].is_complete and not self.runs[0].is_summed


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
def single_positions(axis: Axis, transposed: bool) -> Pieces:
    """Return the axis with a piece for each position."""
    entries = met_entries(axis, transposed)
    size = len(entries)
    return Pieces((Run(0, size, size, tuple(range(size))),), entries)


@lru_cache(maxsize=1024)
def summed_runs(axis: Axis, transposed: bool, innermost: bool) -> Pieces:
    """Return the axis with a piece for each run and remainder.

    Args:
        axis: The axis.
        transposed: See `met_entries`.
        innermost: Whether neighbouring positions are neighbours in memory: several periods are
            then kept apart, so that sums are those of vectors.
    """
    met = met_entries(axis, transposed)
    step = 1 if transposed else axis.stride
    period = step * -(-LANES // step) if innermost and step > 1 else step
    bounds: list[tuple[int, int, int]] = []
    for start, stop in _periodic(met, period):
        if stop - start >= PERIODS * period:
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
    return Pieces(tuple(run for run in runs if run.kept), tuple(entries))


def _periodic(met: tuple[tuple[int, ...], ...], period: int) -> Iterator[tuple[int, int]]:
    """Yield the longest ranges of whole periods with the same entries, from left to right."""
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
def partition(axes: tuple[Axis, ...], transposed: bool, items: int) -> tuple[Pieces, ...]:
    """Return the pieces of each axis, summed first where that is cheaper than a product.

    Args:
        axes: The axes.
        transposed: See `met_entries`.
        items: Number of images, examples times channels.
    """
    entries = prod(axis.kernel_size for axis in axes)
    found = [single_positions(axis, transposed) for axis in axes]
    for dim, axis in enumerate(axes):
        rest = prod(len(pieces.entries) for pieces in found[dim + 1 :])
        before = prod(len(pieces.entries) for pieces in found[:dim])
        runs = summed_runs(axis, transposed, dim == len(axes) - 1)
        size, left = (before * len(p.entries) * rest for p in (found[dim], runs))
        calls = START * sum(map(_calls, runs.runs)) / items
        sums = size * (0.35 if rest == 1 or rest >= 14 else 0.7) + 30 * before + calls
        if sums + left * _product(entries) < size * _product(entries):
            found[dim] = runs
    return tuple(found)


def _product(entries: int) -> float:
    """Return the nanoseconds for an element of a tall and thin product."""
    return 0.25 + 0.025 * entries


def _calls(run: Run) -> int:
    """Return the operations that make the pieces of a run."""
    return 1 if run.is_complete else len(run.kept)


@lru_cache(maxsize=256)
def incidences(
    axes: tuple[Axis, ...], transposed: bool, items: int, typecode: str
) -> tuple[array[float], ...]:
    """Return the matrices ``[k, piece]`` that are 1 where a kernel entry meets a piece, by rows.

    Args:
        axes: See `partition`, as for the arguments that follow.
        transposed: See `partition`.
        items: See `partition`.
        typecode: That of the elements, as in `array`.

    Returns:
        One matrix for all axes together, or, if that is large, one for all but the last and one
        for the last.
    """
    pieces = partition(axes, transposed, items)
    factors = [_incidence(p, axis.kernel_size) for p, axis in zip(pieces, axes)]
    if shares_one_product(axes, transposed, items):
        parts = [reduce(_kron, factors)]
    else:
        parts = [reduce(_kron, factors[:-1]), factors[-1]]
    return tuple(array(typecode, chain.from_iterable(part)) for part in parts)


@lru_cache(maxsize=1024)
def shares_one_product(axes: tuple[Axis, ...], transposed: bool, items: int) -> bool:
    """Return whether one matrix for all axes together is small enough."""
    pieces = partition(axes, transposed, items)
    sizes = (len(p.entries) * axis.kernel_size for p, axis in zip(pieces, axes))
    return len(axes) == 1 or prod(sizes) <= LARGEST


def _incidence(pieces: Pieces, kernel: int) -> list[list[int]]:
    """Return the rows ``[k, piece]`` of the matrix of one axis."""
    return [[int(k in met) for met in pieces.entries] for k in range(kernel)]


def _kron(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    """Return the Kronecker product of two matrices, as rows."""
    return [[a * b for a in above for b in below] for above in left for below in right]
