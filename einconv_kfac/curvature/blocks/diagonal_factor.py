"""Kronecker factors as tensors: dense ``[g, d, d]``, or diagonal as ``[g, d]``.

A factor is diagonal where its inputs are one-hot (embeddings), or where a dense one would be larger
than the largest allowed size. Its products, inverse and eigendecomposition then cost ``O(d)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Returns the product of two stacks of matrices."""


def is_diagonal(factor: Tensor) -> bool:
    """Return whether a factor is kept as its diagonal."""
    return factor.ndim == 2


def diagonal_of(factor: Tensor) -> Tensor:
    """Return the diagonal ``[g, d]`` of a factor."""
    return factor if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def dense(factor: Tensor) -> Tensor:
    """Return a factor as matrices ``[g, d, d]``."""
    return torch.diag_embed(factor) if is_diagonal(factor) else factor


def trace_of(factor: Tensor) -> Tensor:
    """Return the trace per group, ``[g]``."""
    return diagonal_of(factor).sum(-1)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``tr(left right)`` per group, ``[g]``, for factors of one size."""
    if is_diagonal(left) or is_diagonal(right):
        return (diagonal_of(left) * diagonal_of(right)).sum(-1)
    return (left * right).sum((-2, -1))


def times(factor: Tensor, matrix: Tensor, multiply: Product = torch.matmul) -> Tensor:
    """Return ``F V`` for matrices ``V [*v, g, d, n]``.

    Args:
        factor: The factor.
        matrix: The matrices.
        multiply: Multiplies stacks of dense matrices.
    """
    return factor.unsqueeze(-1) * matrix if is_diagonal(factor) else multiply(factor, matrix)


def times_on_right(matrix: Tensor, factor: Tensor, multiply: Product = torch.matmul) -> Tensor:
    """Return ``V F`` for matrices ``V [*v, g, n, d]``; see `times`."""
    return matrix * factor.unsqueeze(-2) if is_diagonal(factor) else multiply(matrix, factor)


def sum_of(factors: list[Tensor]) -> Tensor:
    """Return the sum of factors of one size, which is diagonal if all are."""
    diagonals = [factor for factor in factors if is_diagonal(factor)]
    if len(diagonals) in (0, len(factors)):
        return torch.stack(factors).sum(0)
    total = torch.stack([factor for factor in factors if not is_diagonal(factor)]).sum(0)
    total.diagonal(dim1=-2, dim2=-1).add_(torch.stack(diagonals).sum(0))
    return total
