"""Where a factor goes: ``out <- beta * out + alpha * A``, symmetric to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 512
"""Rows and columns of the blocks into which a symmetric matrix is cut."""


@dataclass(frozen=True)
class Update:
    """The pending update of ``out``, a batch ``[g, D, D]`` of symmetric matrices.

    Args:
        out: The matrices; only their upper block triangle is kept current until `mirror_`.
        beta: What the values in ``out`` are multiplied with; 0 ignores them.
        alpha: What the new matrices are multiplied with.
    """

    out: Tensor
    beta: float
    alpha: float

    def add_product_(self, a: Tensor) -> None:
        """Add ``alpha a a^T`` for ``a`` of shape ``[g, D, L]`` on the upper block triangle."""
        size = a.shape[1]
        edges = [*range(0, size, BLOCK), size]
        for start, stop in pairwise(edges):
            block = self.out[:, start:stop, start:]
            left, right = a[:, start:stop], a[:, start:].mT
            if block.shape[0] == 1:
                block[0].addmm_(left[0], right[0], beta=self.beta, alpha=self.alpha)
            else:
                block.baddbmm_(left, right, beta=self.beta, alpha=self.alpha)

    def added(self) -> Update:
        """Return the update for what remains to be added once ``beta`` has been applied."""
        return replace(self, beta=1.0)

    def within(self, size: int) -> Update:
        """Return the update of the leading ``size`` rows and columns."""
        return replace(self, out=self.out[:, :size, :size])

    def set_(self, rows: Tensor, target: Tensor) -> None:
        """Update ``target``, a part of ``out``, with ``rows`` of its shape."""
        if self.beta == 0:
            target.copy_(rows).mul_(self.alpha)
        else:
            target.mul_(self.beta).add_(rows, alpha=self.alpha)

    def mirror_(self) -> None:
        """Copy the upper triangle to the lower one."""
        mirror_(self.out)


def mirror_(matrices: Tensor) -> None:
    """Copy the upper triangle of ``[g, D, D]`` to the lower one, block by block."""
    size = matrices.shape[-1]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        diagonal = matrices[:, start:stop, start:stop]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
        for begin in range(stop, size, BLOCK):
            end = min(begin + BLOCK, size)
            matrices[:, begin:end, start:stop] = matrices[:, start:stop, begin:end].mT


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a factor of inputs of this dtype: at least float32.

    Raises:
        ValueError: If the dtype is not a real floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"The layer's tensors must be real floating-point numbers, got {dtype}.")
    return torch.promote_types(dtype, torch.float32)


def prepare(
    like: Tensor, shape: tuple[int, int], out: Tensor | None, beta: float, alpha: float
) -> Update:
    """Return the update of ``out``, or of a new tensor, for factors ``[g, D, D]``.

    Args:
        like: The tensor whose dtype and device decide those of the factor.
        shape: Number of groups and size ``D``.
        out: The tensor to update, or none.
        beta: See `Update`.
        alpha: See `Update`.

    Raises:
        ValueError: If ``out`` has another shape, dtype or device or is not contiguous, or
            if there is a ``beta`` but no ``out``.
    """
    groups, size = shape
    expected = (groups, size, size)
    dtype = accumulation_dtype(like.dtype)
    if out is None:
        if beta:
            raise ValueError(f"`beta` must be 0 without `out`, got {beta}.")
        return Update(like.new_empty(expected, dtype=dtype), 0.0, alpha)
    if out.shape != expected or not out.is_contiguous():
        raise ValueError(f"`out` must be contiguous of shape {expected}, got {tuple(out.shape)}.")
    if out.dtype != dtype or out.device != like.device:
        raise ValueError(
            f"`out` must be {dtype} on {like.device}, got {out.dtype} on {out.device}."
        )
    return Update(out, beta, alpha)
