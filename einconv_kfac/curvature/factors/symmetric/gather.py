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

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.factors.symmetric.scatter import store
from einconv_kfac.curvature.factors.symmetric.update import Update

KEPT = 1 << 15
"""Elements of a factor up to which the places of all entries are kept."""


def pair_ranks(size: int, device: torch.device | None = None) -> Tensor:
    """Return the rank of each pair ``k <= k'`` of ``size`` entries, and of its mirror image."""
    above = torch.triu_indices(size, size, device=device)
    ranks = above.new_empty(size, size)
    ranks[above[0], above[1]] = torch.arange(above.shape[1], device=device)
    ranks[above[1], above[0]] = ranks[above[0], above[1]]
    return ranks


def _places(channels: int, leading: int, rest: int, device: torch.device) -> Tensor:
    """Return where each entry of a factor ``[(c k l), (c' k' l')]`` is in ``[kk', c, l, c', l']``.

    ``kk'`` are the pairs of `pair_ranks`.
    """
    size, ranks = channels * rest, pair_ranks(leading, device)
    row, k = torch.arange(size, device=device), torch.arange(leading, device=device)
    place = (row[:, None] * size + row)[..., None, None] + ranks * size**2  # (c l) (c' l') k k'
    is_first = (row[:, None] <= row)[..., None, None] & (k[:, None] == k)
    place = torch.where(is_first | (k[:, None] < k), place, place.transpose(0, 1))
    place = place.view(channels, rest, channels, rest, leading, leading)
    return place.permute(0, 4, 1, 2, 5, 3).flatten()


@lru_cache(maxsize=64)
def _kept_places(channels: int, leading: int, rest: int) -> array[int]:
    """Return the same for a CPU, as an array."""
    return array("q", _places(channels, leading, rest, torch.device("cpu")).tolist())


def write_mirrored(halves: Tensor, leading: int, rest: int, update: Update) -> None:
    """Update the factors with ``halves``, of shape ``[g, kk', (c l c' l')]``.

    Args:
        halves: The entries that were computed.
        leading: The kernel entries ``k`` of the leading dimensions.
        rest: The kernel entries ``l`` of the others.
        update: The update, in which all that is added is already multiplied with ``alpha``.
    """
    groups, size = update.out.shape[:2]
    sizes = (size // (leading * rest), leading, rest)
    plain = type(halves) is Tensor and profile_of(halves.device.type).is_host and size**2 <= KEPT
    if plain and not torch.compiler.is_compiling():
        index = torch.frombuffer(_kept_places(*sizes), dtype=torch.int64)
    else:
        index = _places(*sizes, halves.device)
    halves = halves.reshape(groups, -1)
    if update.beta == 0 and update.out.is_contiguous():
        torch.index_select(halves, 1, index, out=update.out.view(groups, -1))
    else:
        found = torch.index_select(halves, 1, index)
        store(update.out, found.view(groups, size, size), update.beta)
