"""From sums over regions to the factor: each pair of kernel entries is written once."""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.indices.lag_pairs import EntryPairs, Ranges, lags
from einconv_kfac.curvature.factors.symmetric.update import Update, copy_upper_to_lower_
from einconv_kfac.geometry import Axis

Key = tuple[EntryPairs, ...]
"""The lags of all dimensions together."""


def scaled_if_incomplete(update: Update, axes: tuple[Axis, ...]) -> Update:
    """Scale the factor if no lag writes some of its entries; return the remaining update."""
    entries = prod(sum(len(lag.entries) for lag in lags(axis)) for axis in axes)
    if entries == prod(axis.kernel_size for axis in axes) ** 2:
        return update
    update.out.mul_(update.beta) if update.beta else update.out.zero_()
    return update.added()


def write(blocks: Tensor, key: Key, sums: Tensor, beta: float, diagonal: bool = True) -> None:
    """Write ``beta * blocks`` plus the sums over regions for all pairs of one lag.

    Args:
        blocks: View of the factor, ``[g, *c, *k, *c', *k']``, with ``k`` those of the lag.
        key: The lag.
        sums: The products of each region, ``[*r, g, *c, *c']``.
        beta: Multiplier of the old values.
        diagonal: Whether the lags are half of all lags; the transposes are then written too.
    """
    d, distinct = len(key), any(lag.distance for lag in key)
    c = (sums.ndim - d - 1) // 2
    rows, columns = range(d + 1, d + 1 + c), range(d + 1 + c, d + 1 + 2 * c)
    if diagonal and not distinct:
        copy_upper_to_lower_(
            sums.view(-1, prod(sums.shape[d + 1 : d + 1 + c]), prod(sums.shape[d + 1 + c :]))
        )
    store(_pairs(blocks, key, c), _window_sums(sums, key), beta)
    if diagonal and distinct:
        k = range(1, 1 + c + d)
        blocks = blocks.permute(0, *(c + d + dim for dim in k), *k)
        sums = sums.permute(*range(d + 1), *columns, *rows).contiguous()
        target = _pairs(blocks, key, c)
        target = target.permute(
            0, *range(1 + c, 1 + 2 * c), *range(1, 1 + c), *range(1 + 2 * c, target.ndim)
        )
        store(target, _window_sums(sums, key), beta)


def _window_sums(sums: Tensor, key: Key) -> Tensor:
    """Sum ``[*r, g, *c, *c']`` over each window's regions, to ``[g, *c, *c', *pair]``."""
    for dim, lag in enumerate(key):
        if sums.shape[dim] == 1 and all(first < end for first, end in lag.windows):
            sizes = [*sums.shape]
            sizes[dim] = len(lag.windows)
            sums = sums.expand(sizes)
        else:
            sums = torch.stack(_range_sums(sums.unbind(dim), lag.windows), dim)
    d = len(key)
    return sums.permute(*range(d, sums.ndim), *range(d))


def _range_sums(parts: tuple[Tensor, ...], windows: Ranges) -> list[Tensor]:
    """Sum the parts ``first`` to ``end`` of each window, from the sums of windows inside it.

    Parts are added element by element. The order in which ``sum`` adds depends on the address
    in memory, so that an entry and its transpose would differ.
    """
    made: dict[tuple[int, int], Tensor] = {}
    for first, end in sorted(windows, key=lambda window: window[1] - window[0]):
        if (first, end - 1) in made:
            made[first, end] = made[first, end - 1] + parts[end - 1]
        elif (first + 1, end) in made:
            made[first, end] = made[first + 1, end] + parts[first]
        elif first < end:
            made[first, end] = reduce(torch.add, parts[first:end])
        else:
            made[first, end] = torch.zeros_like(parts[0])
    return [made[window] for window in windows]


def _pairs(blocks: Tensor, key: Key, c: int) -> Tensor:
    """View the pairs of one lag in ``[g, *c, *k, *c', *k']``, as ``[g, *c, *c', *pair]``."""
    for remaining, lag in zip(range(len(key), 0, -1), key):
        blocks = blocks.diagonal(lag.distance, 1 + c, 1 + 2 * c + remaining)
        first = lag.entries.start - max(0, -lag.distance)
        blocks = blocks[..., first :: lag.entries.step]
    return blocks


def store(target: Tensor, values: Tensor, beta: float) -> None:
    """Set ``target`` to ``beta * target + values``."""
    if beta == 0:
        target.copy_(values)
    else:
        (target if beta == 1 else target.mul_(beta)).add_(values)
