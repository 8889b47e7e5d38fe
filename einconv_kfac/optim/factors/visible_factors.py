"""Factors of layers that mask their weight, of which entries are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import Pair
from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.layers.layer import Layer


def visible_factors(layer: Layer, factors: Pair) -> Pair | None:
    """Return the factors that the visible entries of a weight have on average.

    Only pairs of visible entries are in the block of a masked weight. Entry ``(i, j)`` of ``A`` is
    multiplied by the cosine of the columns ``i`` and ``j`` of the mask, and that of ``B`` by the
    cosine of its rows. The result is positive semi-definite, as the product of two such matrices
    entry by entry is, and has the same diagonal.

    Args:
        layer: The layer.
        factors: ``A`` and ``B``; those that are diagonal stay.

    Returns:
        ``None`` if there is no mask.
    """
    own = layer.computed
    mask = None if own is None else own.mask()
    if mask is None or any(factor.is_meta for factor in factors):
        return None
    tensors = {name: torch.ones_like(tensor) for name, tensor in layer.zeros().items()}
    matrix = layer.layout.to_matrix({**tensors, layer.layout.weight: mask})
    a, b = factors
    return _times(a, matrix.mT), _times(b, matrix)


def _times(factor: Tensor, rows: Tensor) -> Tensor:
    """Return a factor times the cosines of the rows of a matrix, entry by entry."""
    if is_diagonal(factor):
        return factor
    own = rows.to(factor)
    own = own / own.norm(dim=-1, keepdim=True).clamp_min(1)
    cosines = own @ own.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1)
    result: Tensor = factor * cosines
    return result
