"""One gather into both triangles of a factor, of which half of the entries were computed.

The computed entries are those at kernel entries ``k < k'`` of the leading dimensions, and those at
``k = k'`` and ``(c, l) <= (c', l')``, where ``l`` are the kernel entries of the other dimensions.
The gather copies each to its own position and to the transposed one, so both are equal to the
last bit.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.symmetric.scatter import store
from einconv_kfac.curvature.factors.symmetric.update import Update

KEPT = 1 << 15
"""Largest number of elements of a factor whose gather indices are cached."""


def pair_ranks(size: int, device: torch.device | None = None) -> Tensor:
    """Return the rank of each pair ``k <= k'`` of ``size`` entries, as a symmetric matrix."""
    above = torch.triu_indices(size, size, device=device)
    ranks = above.new_empty(size, size)
    ranks[above[0], above[1]] = torch.arange(above.shape[1], device=device)
    ranks[above[1], above[0]] = ranks[above[0], above[1]]
    return ranks


def _indices(channels: int, leading: int, rest: int, device: torch.device) -> Tensor:
    """Return the index into ``[kk', c, l, c', l']`` of each entry of ``[(c k l), (c' k' l')]``.

    ``kk'`` are the pairs of `pair_ranks`.
    """
    size, ranks = channels * rest, pair_ranks(leading, device)
    row, k = torch.arange(size, device=device), torch.arange(leading, device=device)
    index = (row[:, None] * size + row)[..., None, None] + ranks * size**2  # (c l) (c' l') k k'
    is_first = (row[:, None] <= row)[..., None, None] & (k[:, None] == k)
    index = torch.where(is_first | (k[:, None] < k), index, index.transpose(0, 1))
    index = index.view(channels, rest, channels, rest, leading, leading)
    return index.permute(0, 4, 1, 2, 5, 3).flatten()


@lru_cache(maxsize=64)
def _cached_indices(channels: int, leading: int, rest: int) -> array[int]:
    """Return `_indices` for a CPU, as an array."""
    return array("q", _indices(channels, leading, rest, torch.device("cpu")).tolist())


def write_gathered(halves: Tensor, leading: int, rest: int, update: Update) -> None:
    """Update the factors with ``halves``, of shape ``[g, kk', (c l c' l')]``.

    Args:
        halves: The computed entries.
        leading: The kernel entries ``k`` of the leading dimensions.
        rest: The kernel entries ``l`` of the others.
        update: The update; ``halves`` are already multiplied by ``alpha``.
    """
    groups, size = update.out.shape[:2]
    sizes = (size // (leading * rest), leading, rest)
    plain = type(halves) is Tensor and profile_of(halves.device.type).is_host and size**2 <= KEPT
    if plain and not torch.compiler.is_compiling():
        index = torch.frombuffer(_cached_indices(*sizes), dtype=torch.int64)
    else:
        index = _indices(*sizes, halves.device)
    halves = halves.reshape(groups, -1)
    if update.beta == 0 and update.out.is_contiguous():
        torch.index_select(halves, 1, index, out=update.out.view(groups, -1))
    else:
        found = torch.index_select(halves, 1, index)
        store(update.out, found.view(groups, size, size), update.beta)
