"""Entries of which each pair of mirror images was computed once, gathered into a factor.

An entry at kernel entries ``k <= k'`` of the leading dimensions, or where these are equal at
``(c, l) <= (c', l')``, is one that was computed; ``l`` are the kernel entries of the rest. One
gather puts it in its place and in its mirror image's, which is then equal to the last bit.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.assembly import store
from einconv_kfac.curvature.factors.update import Update

LARGEST = 1 << 15
"""Elements of a factor up to which the places of all entries are kept."""


def pair_ranks(size: int) -> Tensor:
    """Return the rank of each pair ``k <= k'`` of ``size`` entries, and of its mirror image."""
    above = torch.triu_indices(size, size)
    ranks = above.new_empty(size, size)
    ranks[above[0], above[1]] = ranks[above[1], above[0]] = torch.arange(above.shape[1])
    return ranks


@lru_cache(maxsize=64)
def _places(channels: int, leading: int, rest: int) -> array[int]:
    """Return where each entry of a factor ``[(c k l), (c' k' l')]`` is in ``[kk', c, l, c', l']``.

    ``kk'`` are the pairs of `pair_ranks`.
    """
    size, ranks = channels * rest, pair_ranks(leading)
    place = torch.arange(size**2).view(size, size, 1, 1) + ranks * size**2  # (c l) (c' l') k k'
    row, k = torch.arange(size), torch.arange(leading)
    is_first = (row[:, None] <= row)[..., None, None] & (k[:, None] == k)
    place = torch.where(is_first | (k[:, None] < k), place, place.transpose(0, 1))
    place = place.view(channels, rest, channels, rest, leading, leading)
    return array("q", place.permute(0, 4, 1, 2, 5, 3).flatten().tolist())


def write_mirrored(halves: Tensor, leading: int, rest: int, update: Update) -> None:
    """Update the factors with ``halves``, of shape ``[g, kk', (c l c' l')]``.

    Args:
        halves: The entries that were computed, on a CPU.
        leading: The kernel entries ``k`` of the leading dimensions.
        rest: The kernel entries ``l`` of the others.
        update: The update, in which all that is added is already multiplied with ``alpha``.
    """
    groups, size = update.out.shape[:2]
    places = _places(size // (leading * rest), leading, rest)
    index = torch.frombuffer(places, dtype=torch.int64)
    halves = halves.reshape(groups, -1)
    if update.beta == 0 and update.out.is_contiguous():
        torch.index_select(halves, 1, index, out=update.out.view(groups, -1))
    else:
        found = torch.index_select(halves, 1, index)
        store(update.out, found.view(groups, size, size), update.beta)
