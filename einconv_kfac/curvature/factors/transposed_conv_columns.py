"""The columns of the unfolded input of a transposed convolution.

The factor is block-diagonal over the residue classes of kernel entries. Within a class the
columns are those of an ordinary convolution; see `indices.residue_classes`.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.columns import Columns
from einconv_kfac.curvature.factors.conv_columns import ConvColumns
from einconv_kfac.curvature.factors.indices.residue_classes import ResidueClass, residue_classes
from einconv_kfac.curvature.factors.reduce import window_sums
from einconv_kfac.curvature.factors.symmetric.update import Target, Update, blocks_of, prepare
from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import pad_input


class TransposedConvColumns(Columns):
    """The columns of the unfolded input ``x`` of a transposed convolution, ``[n, c, *o]``.

    Args:
        x: The input.
        geometry: The convolution whose output is ``x``.
        algorithm: See `ConvColumns`.
    """

    def __init__(self, x: Tensor, geometry: Geometry, algorithm: str | None) -> None:
        size = geometry.split_channels(x.shape[1]) * prod(geometry.kernel_size)
        positions = prod(geometry.input_size)
        x = _pad_to(x, geometry.output_size)
        super().__init__(x, (x.shape[0], geometry.groups, size, positions))
        self._geometry, self._algorithm = geometry, algorithm

    def add_(self, update: Update) -> None:
        """See `Columns`; one residue class after the other."""
        blocks = blocks_of(update.out, self._geometry.kernel_size)
        blocks.mul_(update.beta) if update.beta else blocks.zero_()
        target = Target(alpha=update.alpha)
        for classes in product(*map(residue_classes, self._geometry.axes)):
            columns = self._columns_of(classes)
            fresh = prepare(columns.like, (columns.groups, columns.size), target)
            columns.add_(fresh)
            kernel = tuple(len(found.entries) for found in classes)
            _class_blocks(blocks, classes).add_(_reversed_blocks(fresh.out, kernel))

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return window_sums(self.like, self._geometry, dtype, transposed=True)

    def _columns_of(self, classes: tuple[ResidueClass, ...]) -> ConvColumns:
        """Return the columns of one residue class per dimension, with reversed kernels."""
        ordinary = Geometry(tuple(found.axis for found in classes), self._geometry.groups)
        kept: tuple[Any, ...] = (..., *(found.kept for found in classes))
        return ConvColumns(self.like[kept], ordinary, self._algorithm)


def _pad_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Append zeros for outputs that a large ``output_padding`` adds to the convolution."""
    return pad_input(x, [(0, wanted - have) for wanted, have in zip(size, x.shape[2:])])


def _class_blocks(blocks: Tensor, classes: tuple[ResidueClass, ...]) -> Tensor:
    """View the entries of one class in ``blocks``, of shape ``[g, ci, *k, ci', *k']``."""
    entries = [sorted(found.entries) for found in classes]
    slices = [slice(e[0], e[-1] + 1, e[1] - e[0] if len(e) > 1 else 1) for e in entries]
    return blocks[(slice(None), slice(None), *slices, slice(None), *slices)]


def _reversed_blocks(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return ``[g, (ci *k), (ci' *k')]`` as ``[g, ci, *k, ci', *k']``, each kernel reversed."""
    d = len(kernel)
    return blocks_of(factor, kernel).flip([*range(2, 2 + d), *range(3 + d, 3 + 2 * d)])
