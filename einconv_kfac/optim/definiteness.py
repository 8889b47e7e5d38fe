"""Checks of saved factors and inverses: symmetric, and without a negative direction in sight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.state_schema import Leaf, Schema, is_dense_tensor, tensor_of

MATRIX_DIMS = 3
"""Dimensions of matrices ``[g, d, d]``; diagonals have one less."""


def is_semidefinite(factor: Tensor) -> bool:
    """Return whether matrices, or diagonals, may be positive semidefinite, as far as is cheap.

    Matrices must be symmetric, without negative entries on the diagonal, and ``f_ij^2`` must be at
    most ``f_ii f_jj``, which holds for all principal minors of two rows. Each holds up to rounding.

    >>> is_semidefinite(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]))
    True
    >>> is_semidefinite(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    False
    """
    if factor.numel() == 0:
        return True
    is_matrix = factor.ndim == MATRIX_DIMS
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if is_matrix else factor
    rounding = torch.finfo(factor.dtype).eps ** 0.5 * diagonal.abs().amax(-1, keepdim=True)
    if not bool((diagonal >= -rounding).all()):
        return False
    if not is_matrix:
        return True
    root = diagonal.clamp_min(0).sqrt()
    bound = torch.addcmul(rounding[:, None], root[:, :, None], root[:, None, :])
    is_bounded = (factor.abs() <= bound).all()
    return bool(is_bounded & ((factor - factor.mT).abs() <= rounding[:, None]).all())


def is_orthonormal(basis: Tensor) -> bool:
    """Return whether all columns of matrices have the norm 1, up to rounding."""
    tolerance = torch.finfo(basis.dtype).eps ** 0.5
    return bool(((basis.norm(dim=-2) - 1).abs() <= tolerance).all())


def _is_factor(value: Any) -> bool:
    """Return whether a value is a factor without an entry that none has."""
    is_real = is_dense_tensor(value) and not value.is_complex() and value.ndim in (2, MATRIX_DIMS)
    is_square = is_real and (value.ndim == 2 or value.shape[-1] == value.shape[-2])
    return is_square and bool(value.isfinite().all()) and is_semidefinite(value)


FACTOR = Leaf(
    "a dense floating-point tensor of finite numbers, symmetric and positive semidefinite,",
    _is_factor,
)


def semidefinite_of(shape: Sequence[int]) -> Schema:
    """Return the schema of matrices, or of diagonals, that are positive semidefinite.

    Args:
        shape: Their shape.
    """
    known = tensor_of(shape)
    rule = f"{known.rule}, symmetric and positive semidefinite,"
    return Leaf(rule, lambda value: known.holds(value) and is_semidefinite(value))


def orthonormal_of(shape: Sequence[int]) -> Schema:
    """Return the schema of matrices whose columns have the norm 1.

    Args:
        shape: Their shape.
    """
    known = tensor_of(shape)
    rule = f"{known.rule} with orthonormal columns"
    return Leaf(rule, lambda value: known.holds(value) and is_orthonormal(value))
