"""Inverses of damped factors, by the way that is fastest for their size and rank."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.blocks.low_rank import RankBound

PLANE = 2
"""Dimension of matrices that have a short closed form of the inverse."""


def damped_inverse(factor: Tensor, damping: Tensor, bound: RankBound) -> tuple[Tensor, Tensor]:
    """Return ``(factor + damping I)^-1`` per group, and a number per group, ``[g]``.

    The number is not zero where the damped factor is not positive definite. The host waits for no
    GPU.

    Args:
        factor: The factor ``[g, d, d]``, or its diagonal ``[g, d]``.
        damping: The damping ``[g]``, positive or zero.
        bound: A bound on the rank of the factor.
    """
    if (form := bound.form(factor)) is not None and bool((damping > 0).all()):
        inverse, failures = _inverse(form.core, damping)
        return form.inverse(inverse, damping), failures
    return _inverse(factor, damping)


def _inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return `damped_inverse` of a factor of any rank."""
    size = factor.shape[-1]
    if is_diagonal(factor) or size == 1:
        damped = factor + damping.reshape(-1, *(1,) * (factor.ndim - 1))
        inverse = damped.reciprocal()
        failures = ~(inverse > 0).flatten(1).all(-1)
    elif size == PLANE:
        inverse, positive = _inverse_in_plane(factor, damping)
        failures = ~positive
    else:
        damped = factor.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        triangle, failures = torch.linalg.cholesky_ex(damped)
        # an unfinished triangle may have a zero on its diagonal, and cannot be inverted
        triangle.diagonal(dim1=-2, dim2=-1).masked_fill_((failures != 0).unsqueeze(-1), 1)
        inverse = torch.cholesky_inverse(triangle)
    return inverse, failures


def _inverse_in_plane(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return `damped_inverse` of 2x2 matrices by their Schur complements, and what is positive."""
    first, last = factor[:, 0, 0] + damping, factor[:, 1, 1] + damping
    slope = factor[:, 1, 0] / first
    complement = last - slope * factor[:, 1, 0]
    corner = complement.reciprocal()
    side = -slope * corner
    inverse = torch.stack([first.reciprocal() - slope * side, side, side, corner], -1)
    return inverse.reshape(-1, PLANE, PLANE), (first > 0) & (complement > 0)
