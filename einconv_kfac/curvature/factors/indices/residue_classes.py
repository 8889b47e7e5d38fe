"""Residue classes of kernel entries, for which a transposed convolution is an ordinary one.

Position ``i`` of a transposed convolution meets kernel entry ``k`` iff
``i = o S + k D - left`` for an input position ``o``. So the entries that meet a position all
have the same residue of ``k D`` modulo ``S``: the factor is block-diagonal over these classes.
Within one, the positions are every ``S``-th, and the windows are those of an ordinary
convolution with stride 1, dilation ``D / gcd(D, S)`` and a reversed kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from einconv_kfac.geometry import Axis


@dataclass(frozen=True)
class ResidueClass:
    """Kernel entries of one axis that meet the same positions, as an ordinary convolution.

    Args:
        entries: The kernel entries, in the order of ``axis``' kernel.
        kept: The range of the input that contains all positions that they meet.
        axis: The ordinary convolution over that range.
    """

    entries: tuple[int, ...]
    kept: slice
    axis: Axis


@lru_cache(maxsize=1024)
def residue_classes(axis: Axis) -> tuple[ResidueClass, ...]:
    """Return the classes of ``axis``, whose output is the transposed convolution's input.

    Kernel entries that meet no position at all belong to no class.
    """
    common = gcd(axis.dilation, axis.stride)
    found = (
        _residue_class(axis, first, axis.stride // common)
        for first in range(min(axis.stride // common, axis.kernel_size))
    )
    return tuple(entry for entry in found if entry is not None)


def _residue_class(axis: Axis, first: int, step: int) -> ResidueClass | None:
    """Return the class of the entries ``first, first + step, ..``, if any meets a position."""
    entries = tuple(range(first, axis.kernel_size, step))[::-1]
    dilation = axis.dilation * step // axis.stride
    start = (first * axis.dilation - axis.padding[0]) % axis.stride  # the first position
    count = len(range(start, axis.input_size, axis.stride))
    if not any(axis.outputs(k) for k in entries):
        return None
    last = start + axis.padding[0] - first * axis.dilation
    left = (len(entries) - 1) * dilation - last // axis.stride
    span = (len(entries) - 1) * dilation + 1
    right = count - 1 + span - left - axis.output_size
    kept = slice(max(0, -left), axis.output_size - max(0, -right))
    sides = (max(0, left), max(0, right))
    ordinary = Axis(kept.stop - kept.start, len(entries), 1, sides, dilation)
    return ResidueClass(entries, kept, ordinary)
