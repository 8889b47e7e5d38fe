"""Where a factor goes: ``out <- beta * out + alpha * A``, symmetric to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.products import add_matmul_

PANEL = 128
"""Rows in a panel of the upper block triangle."""

DIAGONAL = 1 << 17
"""Elements on the diagonal that are made symmetric at a time, so that they stay in a cache."""


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

    def add_product_(self, a: Tensor, last: bool = True) -> None:
        """Add ``alpha a a^T`` for ``a`` of shape ``[g, D, L]`` on the upper block triangle.

        Args:
            a: The factor of the product.
            last: Whether this is the last product, so that the lower triangle can follow.
        """
        for start, stop in pairwise(panels(a.shape[1], self.out.device.type)):
            left, right = a[:, start:stop], a[:, start:].mT
            add_matmul_(self.out[:, start:stop, start:], left, right, self.beta, self.alpha)
            if last:
                mirror_panel_(self.out, start, stop)

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


def panels(size: int, device: str) -> list[int]:
    """Return the bounds of the panels of rows whose products with what follows are computed.

    On a CPU narrow panels save up to half of the multiplications of a full square; on other
    devices a product must be large to be fast.
    """
    width = PANEL if device == "cpu" else 8 * PANEL
    return [*range(0, size, width), size]


def blocks_of(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """View ``[g, (ci *k), (ci' *k')]`` as ``[g, ci, *k, ci', *k']``."""
    rows = torch.unflatten(factor, 1, (-1, *kernel))
    return torch.unflatten(rows, rows.ndim - 1, (-1, *kernel))


def mirror_(matrices: Tensor) -> None:
    """Copy the upper triangle of ``[g, D, D]`` to the lower one."""
    for start, stop in pairwise(panels(matrices.shape[-1], "cpu")):
        mirror_panel_(matrices, start, stop)


def mirror_block_(matrices: Tensor, rows: slice, columns: slice) -> None:
    """Copy a block above the diagonal to below it, in strips that stay in a cache."""
    for start in range(rows.start, rows.stop, PANEL):
        strip = slice(start, min(start + PANEL, rows.stop))
        matrices[:, columns, strip] = matrices[:, strip, columns].mT


def mirror_panel_(matrices: Tensor, start: int, stop: int) -> None:
    """Copy a panel of rows, right of its square on the diagonal, to the columns below that.

    The square itself becomes the mean of both triangles.
    """
    count = max(1, DIAGONAL // (stop - start) ** 2)
    for diagonal in torch.split(matrices[:, start:stop, start:stop], count):
        torch.mul(diagonal + diagonal.mT, 0.5, out=diagonal)
    matrices[:, stop:, start:stop] = matrices[:, start:stop, stop:].mT


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
