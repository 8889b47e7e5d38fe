"""From sums over regions to the factor: each pair of kernel entries is written once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.operations import Operation, Scratch, run
from einconv_kfac.curvature.factors.indices.lag_pairs import EntryPairs, Ranges, lags
from einconv_kfac.curvature.factors.symmetric.update import Update, copy_upper_to_lower_
from einconv_kfac.geometry import Axis

Key = tuple[EntryPairs, ...]
"""The lags of all dimensions together."""

MATRIX_ELEMENTS = 1 << 14
"""Elements of matrices from which they are copied one by one: calls cost less than memory does."""


def scaled_if_incomplete(update: Update, axes: tuple[Axis, ...]) -> Update:
    """Scale the factor if no lag writes some of its entries; return the remaining update."""
    entries = prod(sum(len(lag.entries) for lag in lags(axis)) for axis in axes)
    if entries == prod(axis.kernel_size for axis in axes) ** 2:
        return update
    update.out.mul_(update.beta) if update.beta else update.out.zero_()
    return update.added()


def write(blocks: Tensor, key: Key, sums: Tensor, beta: float, diagonal: bool = True) -> None:
    """Write ``beta * blocks`` plus the sums over regions of one lag: see `writing`."""
    run(writing(blocks, key, sums, beta, Scratch(), diagonal))


def writing(
    blocks: Tensor, key: Key, sums: Tensor, beta: float, scratch: Scratch, diagonal: bool = True
) -> list[Operation]:
    """Return the writes of ``beta * blocks`` plus the sums over regions for all pairs of one lag.

    Args:
        blocks: View of the factor, ``[g, *c, *k, *c', *k']``, with ``k`` those of the lag.
        key: The lag.
        sums: The products of each region, ``[*r, g, *c, *c']``.
        beta: Multiplier of the old values.
        scratch: Memory of the task.
        diagonal: Whether the lags are half of all lags; the transposes are then written too.
    """
    d, distinct = len(key), any(lag.distance for lag in key)
    c = (sums.ndim - d - 1) // 2
    operations: list[Operation] = []
    if diagonal and not distinct:
        size = prod(sums.shape[d + 1 : d + 1 + c])
        operations.append(partial(copy_upper_to_lower_, sums.view(-1, size, size)))
    writes = _Writes(tuple(lag.windows for lag in key), beta, scratch)
    operations += writes.of(_pairs(blocks, key, c), sums)
    if diagonal and distinct:
        k = range(1, 1 + c + d)
        opposite = _pairs(blocks.permute(0, *(c + d + dim for dim in k), *k), key, c)
        opposite = opposite.permute(
            *range(d + 1), *range(d + 1 + c, opposite.ndim), *range(d + 1, d + 1 + c)
        )
        turned, copies = _transposed(sums, d + 1, c, scratch)
        operations += [*copies, *writes.of(opposite, turned)]
    return operations


class _Writes:
    """The writes of sums over windows of regions, as operations on views made before.

    Parts are added element by element. The order in which ``sum`` adds depends on the address in
    memory, so that an entry and its transpose would differ.

    Args:
        windows: The windows of each dimension.
        beta: Multiplier of the old values.
        scratch: Memory of the task.
    """

    def __init__(self, windows: tuple[Ranges, ...], beta: float, scratch: Scratch) -> None:
        self._windows, self._beta, self._scratch = windows, beta, scratch

    def of(self, target: Tensor, sums: Tensor) -> Iterator[Operation]:
        """Yield the writes of sums ``[*r, ...]`` to entries ``[*pair, ...]``."""
        summed: list[Ranges] = []
        for windows in self._windows:
            dim = len(summed)
            if sums.shape[dim] == 1 and all(first < end for first, end in windows):
                target = target.movedim(dim, -1)  # all pairs have the same sum
                sums = sums.select(dim, 0).unsqueeze(-1)
            else:
                summed.append(windows)
        return self._along(target, sums, tuple(summed))

    def _along(
        self, target: Tensor, sums: Tensor, summed: tuple[Ranges, ...]
    ) -> Iterator[Operation]:
        """Yield the writes of sums ``[*r, ...]`` over the windows of the first dimensions."""
        if not summed:
            yield self._storing(target, sums)
        elif len(summed) > 1 and prod(sums.shape[len(summed) :]) < MATRIX_ELEMENTS:
            yield from self._together(target, sums, summed)
        else:
            yield from self._one_by_one(target, sums, summed)

    def _together(
        self, target: Tensor, sums: Tensor, summed: tuple[Ranges, ...]
    ) -> Iterator[Operation]:
        """Yield the sums over all windows of the first dimension, and writes of all of them."""
        windows, others = summed[0], summed[1:]
        total = self._scratch.empty((len(windows), *sums.shape[1:]), sums, len(others))
        made: dict[tuple[int, int], Tensor] = {}
        for i in _shortest_first(windows):
            yield from _setting(total[i], _terms(sums, windows[i], made))
            made[windows[i]] = total[i]
        yield from self._along(target.movedim(0, -1), total.movedim(0, -1), others)

    def _one_by_one(
        self, target: Tensor, sums: Tensor, summed: tuple[Ranges, ...]
    ) -> Iterator[Operation]:
        """Yield the writes of the windows of the first dimension; single regions are not copied."""
        windows, others = summed[0], summed[1:]
        made: dict[tuple[int, int], Tensor] = {}
        for i in _shortest_first(windows):
            part, terms = target[i], _terms(sums, windows[i], made)
            is_last = not others and not self._beta
            if len(terms) == 1:
                value = terms[0]
            elif is_last:
                value, terms = part, [term.expand_as(part) for term in terms]
            else:
                value = self._scratch.empty(sums.shape[1:], sums, (len(others), i))
            made[windows[i]] = value
            if len(terms) != 1:
                yield from _setting(value, terms)
            if value is not part:
                yield from self._along(part, value, others)

    def _storing(self, target: Tensor, values: Tensor) -> Operation:
        """Return the operation that sets ``target`` to ``beta * target + values``."""
        if self._beta in (0, 1):
            return partial(target.add_ if self._beta else target.copy_, values)
        return partial(store, target, values, self._beta)


def _terms(
    sums: Tensor, window: tuple[int, int], made: Mapping[tuple[int, int], Tensor]
) -> list[Tensor]:
    """Return what a window's sum consists of: that of one inside it and a region, or regions."""
    first, end = window
    if window in made:
        return [made[window]]
    if (first, end - 1) in made:
        return [made[first, end - 1], sums[end - 1]]
    if (first + 1, end) in made:
        return [made[first + 1, end], sums[first]]
    return list(sums[first:end])


def _shortest_first(windows: Ranges) -> list[int]:
    """Return the order of windows in which those inside others come first."""
    return sorted(range(len(windows)), key=lambda i: windows[i][1] - windows[i][0])


def _setting(total: Tensor, terms: list[Tensor]) -> Iterator[Operation]:
    """Yield the operations that set ``total`` to the sum of terms."""
    if not terms:
        yield total.zero_
    elif len(terms) == 1:
        yield partial(total.copy_, terms[0])
    else:
        yield partial(torch.add, terms[0], terms[1], out=total)
    for term in terms[2:]:
        yield partial(total.add_, term)


def _transposed(
    sums: Tensor, start: int, c: int, scratch: Scratch
) -> tuple[Tensor, list[Operation]]:
    """Return ``[..., *c', *c]`` for sums ``[..., *c, *c']``, and the copies to its memory.

    Args:
        sums: The sums.
        start: The first dimension of ``*c``.
        c: The number of dimensions of ``*c``.
        scratch: Memory of the task.
    """
    rows, columns = range(start, start + c), range(start + c, sums.ndim)
    turned = sums.permute(*range(start), *columns, *rows)
    copy = scratch.empty(turned.shape, sums, "transposed")
    shape = (-1, prod(sums.shape[start : start + c]), prod(sums.shape[start + c :]))
    is_cached = profile_of(sums.device.type).is_cached
    if not (is_cached and sums.is_contiguous() and shape[1] * shape[2] >= MATRIX_ELEMENTS):
        return copy, [partial(copy.copy_, turned)]
    pairs = zip(copy.view(-1, shape[2], shape[1]), sums.view(shape))
    return copy, [partial(target.copy_, matrix.T) for target, matrix in pairs]


def _pairs(blocks: Tensor, key: Key, c: int) -> Tensor:
    """View the pairs of one lag in ``[g, *c, *k, *c', *k']``, as ``[*pair, g, *c, *c']``."""
    for remaining, lag in zip(range(len(key), 0, -1), key):
        blocks = blocks.diagonal(lag.distance, 1 + c, 1 + 2 * c + remaining)
        first = lag.entries.start - max(0, -lag.distance)
        blocks = blocks[..., first :: lag.entries.step]
    return blocks.permute(*range(1 + 2 * c, blocks.ndim), *range(1 + 2 * c))


def store(target: Tensor, values: Tensor, beta: float) -> None:
    """Set ``target`` to ``beta * target + values``."""
    if beta == 0:
        target.copy_(values)
    else:
        (target if beta == 1 else target.mul_(beta)).add_(values)
