"""How often factors are inverted early in training, where inversions cost more than passes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from einconv_kfac.optim.factors.running import RunningFactors

PASSES = 3
"""Products with each weight per row of its inputs, in a forward and a backward pass."""
SMALLEST_SIZE = 256
"""Rows of a factor from which its inversion counts: smaller ones take less time than the calls of a
layer."""


def spacing(layers: Iterable[RunningFactors]) -> int:
    """Return the least number of steps between two inversions early in training.

    In as many steps, forward and backward passes take at most as many operations as an inversion of
    all factors: ``d^3`` for one of ``d`` rows, and ``6 n co d`` for ``n`` rows of inputs of a layer
    with ``d`` inputs and ``co`` outputs. It follows from shapes, so that all workers, and a run
    that is resumed, have the same.

    Args:
        layers: The layers; those whose calls were not seen do not count.
    """
    inversions = passes = 0
    for own in layers:
        if own.rows:
            inversions += _inversion_operations(own)
            passes += 2 * PASSES * own.rows * _entries(own)
    return max(1, inversions // passes) if passes else 1


def _inversion_operations(running: RunningFactors) -> int:
    """Return the operations of the inversions of a layer's factors, as far as they count."""
    sizes = [(shape[0], shape[-1]) for shape in running.shapes if shape[1:-1]]  # not diagonal
    return sum(groups * size**3 for groups, size in sizes if size >= SMALLEST_SIZE)


def _entries(running: RunningFactors) -> int:
    """Return the entries that a row of inputs meets; a one-hot one is looked up."""
    layer = running.layer
    return 0 if all(use.rule.one_hot for use in layer.uses) else prod(layer.layout.shape)
