"""From the sums over regions to the factor, by one product with a small matrix.

The window of a pair of kernel entries is a union of regions. So the sums over all windows are the
sums over all regions times a 0/1 matrix ``[kk', region]``, which takes a few calls for any number
of lags. Half of the lags have all pairs ``k <= k'``.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.constant_matrix import ARRAY_TYPECODES, constant_matrix
from einconv_kfac.curvature.factors.indices.lag_pairs import Key, half_of_lags
from einconv_kfac.curvature.factors.symmetric.gather import KEPT, pair_ranks, write_gathered
from einconv_kfac.curvature.factors.symmetric.scatter import scaled_if_incomplete, write
from einconv_kfac.curvature.factors.symmetric.update import Update, blocks_of
from einconv_kfac.geometry import Axis

Region = tuple[tuple[int, int], ...]

MOST_GATHERED_CHANNELS = 4
"""Channels up to which one product and a gather are faster than a few calls for each lag."""

WINDOW_SUMS_AT_ONCE = 1 << 17
"""Number of sums over windows that are computed at a time, so that they stay in a cache."""


@lru_cache(maxsize=256)
def regions_of(axes: tuple[Axis, ...]) -> tuple[tuple[Key, Region], ...]:
    """Return the regions of half of the lags, ordered by lag."""
    return tuple(
        (key, region)
        for key in half_of_lags(axes)
        for region in product(*(lag.regions for lag in key))
    )


@lru_cache(maxsize=256)
def _members(axes: tuple[Axis, ...], typecode: str) -> array[float]:
    """Return the matrix ``[kk', region]``, by rows: 1 where a pair's window has a region."""
    kernel, columns = [axis.kernel_size for axis in axes], len(regions_of(axes))
    ranks, first = pair_ranks(prod(kernel)).tolist(), 0
    values: array[float] = array(typecode, [0.0]) * ((ranks[-1][-1] + 1) * columns)
    for key in half_of_lags(axes):
        sizes = [len(lag.regions) for lag in key]
        for pairs in product(*(zip(lag.entries, lag.windows) for lag in key)):
            here = _flat([k for k, _ in pairs], kernel)
            there = here + _flat([lag.distance for lag in key], kernel)
            for region in product(*(range(*window) for _, window in pairs)):
                values[ranks[here][there] * columns + first + _flat(region, sizes)] = 1.0
        first += prod(sizes)
    return values


def _flat(index: list[int] | tuple[int, ...], sizes: list[int]) -> int:
    """Return the flat index, or difference of flat indices, in an array of these sizes."""
    flat = 0
    for i, size in zip(index, sizes):
        flat = flat * size + i
    return flat


def write_regions(sums: Tensor, axes: tuple[Axis, ...], update: Update) -> None:
    """Update the factor with the sums ``[r, g, c, k, c', k']`` of all regions of ``axes``.

    Few channels on a CPU take one product; otherwise each lag is written on its own.

    Args:
        sums: The sums; ``k`` are the kernel entries of the last dimension.
        axes: The leading dimensions.
        update: The update; ``sums`` are already multiplied by ``alpha``.
    """
    plain = type(sums) is Tensor and profile_of(sums.device.type).is_host and len(sums)
    is_small = sums.shape[2] <= MOST_GATHERED_CHANNELS and update.out[0].numel() <= KEPT
    if plain and is_small and not torch.compiler.is_compiling():
        _write_all(sums, axes, update)
        return
    kernel = (*(axis.kernel_size for axis in axes), sums.shape[-1])
    blocks = blocks_of(update.out, kernel).movedim((1 + len(kernel), -1), (2, 3 + len(kernel)))
    update, first = scaled_if_incomplete(update, axes), 0
    for key in half_of_lags(axes):  # blocks: g ci k *k ci' k' *k'
        sizes = [len(lag.regions) for lag in key]
        last = first + prod(sizes)
        write(blocks, key, torch.unflatten(sums[first:last], 0, sizes), update.beta)
        first = last


def _write_all(sums: Tensor, axes: tuple[Axis, ...], update: Update) -> None:
    """Write all lags by one product for some groups at a time."""
    regions, groups, inner = *sums.shape[:2], sums.shape[-1]
    elements = _members(axes, ARRAY_TYPECODES[sums.dtype])
    members = constant_matrix(elements, len(elements) // regions, sums.dtype)
    sums = sums.view(regions, groups, -1)
    pairs, kernel = len(members), prod(axis.kernel_size for axis in axes)
    step = max(1, WINDOW_SUMS_AT_ONCE // (pairs * sums.shape[2]))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        halves = torch.mm(members, sums[:, part].flatten(1)).view(pairs, -1, sums.shape[2])
        some = replace(update, out=update.out[part])
        write_gathered(halves.transpose(0, 1), kernel, inner, some)
