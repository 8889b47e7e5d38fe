"""Updates ``out <- beta * out + alpha * A`` that are symmetric to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import SHORT_SUM_TERMS, add_matmul_
from einconv_kfac.curvature.devices.threads import run_tasks, threads_for
from einconv_kfac.curvature.factors.symmetric.allocation import new_matrices
from einconv_kfac.curvature.factors.symmetric.whole_products import (
    add_whole_,
    is_symmetric_by_itself,
)

PANEL = 128
"""Rows in a panel of the upper block triangle."""

STRIP = 64
"""Rows of a panel that are copied to columns at a time, so that both stay in a cache."""

SHARED_ROWS = 256
"""Rows of a factor for each thread that shares its panels, which become shorter."""

SHARED_MACS = 1 << 26
"""Multiplications of a product from which threads share its panels."""

Range = tuple[int, int]
"""The first row of a panel, and the row after its last."""

DIAGONAL = 1 << 17
"""Elements of diagonal blocks that are averaged at a time, so that they stay in a cache."""


@dataclass(frozen=True)
class Target:
    """Where a factor ``A`` is added: ``out <- beta * out + alpha * A``.

    Args:
        out: The symmetric tensor to update, or none for a new one.
        beta: Multiplier of the old values of ``out``.
        alpha: Multiplier of the factor.
    """

    out: Tensor | None = None
    beta: float = 0.0
    alpha: float = 1.0

    def averaged(self, terms: int) -> Target:
        """Return the target for a sum of which the factor is the mean over ``terms``."""
        return Target(self.out, self.beta, self.alpha / terms)


@dataclass(frozen=True)
class Update:
    """The pending update of ``out``, a batch ``[g, D, D]`` of symmetric matrices.

    Args:
        out: The matrices. Before the last product only the upper block triangle is up to date.
        beta: Multiplier of the values in ``out``; 0 ignores them.
        alpha: Multiplier of the new matrices.
        is_begun: Whether something was added, if only to the upper block triangle.
    """

    out: Tensor
    beta: float
    alpha: float
    is_begun: bool = False

    def add_product_(self, a: Tensor, last: bool = True) -> None:
        """Add ``alpha a a^T`` for ``a`` of shape ``[g, D, L]`` on the upper block triangle.

        Args:
            a: The factor of the product.
            last: Whether this is the last product, after which the lower triangle is written.
        """
        kind, (groups, size, length) = self.out.device.type, a.shape
        if last and not self.is_begun and is_symmetric_by_itself(self.out, a, self.alpha):
            add_whole_(self.out, a, self.beta, self.alpha)
            return
        if last and self.beta == 0 and halves_are_faster(size, length, _threads_of(a)):
            self._set_whole_(a)
            return
        if last and profile_of(kind).is_cached and (groups == 1 or size > 2 * PANEL):
            for matrix, factor in zip(self.out, a):
                self._add_shared_(partial(self._add_by_buffer_, matrix, factor), a)
        else:
            self._add_shared_(partial(self._add_panels_, a, last), a)
        if last:  # by one thread of those that added it
            run_tasks([partial(average_diagonal_blocks_, self.out)], _threads_of(a))

    def _add_shared_(self, add: Callable[[list[Range]], None], a: Tensor) -> None:
        """Add the product of ``a`` with its transpose, some panels on each thread."""
        threads = _threads_of(a)
        shares = _shares(list(pairwise(panels(a.shape[1], a.device.type))), threads)
        run_tasks([partial(add, own) for own in shares], threads if len(shares) > 1 else 1)

    def _add_panels_(self, a: Tensor, last: bool, bounds: list[Range]) -> None:
        """Add some panels of the product of ``a`` with its transpose to ``out``."""
        for start, stop in bounds:
            left, right = a[:, start:stop], a[:, start:].mT
            add_matmul_(self.out[:, start:stop, start:], left, right, self.beta, self.alpha)
            if last:
                copy_transposed_panel_(self.out, start, stop)

    def _add_by_buffer_(self, out: Tensor, a: Tensor, bounds: list[Range]) -> None:
        """Add some panels to ``out``, one matrix, for ``a`` of shape ``[D, L]``.

        A panel of rows is computed in a buffer and copied from there to rows and to columns. The
        buffer's rows, unlike those of ``out``, do not compete for the same sets of a cache.
        """
        size = len(out)
        buffer = out.new_empty(
            profile_of(out.device.type).panel_rows, ((size + 15) // 16 | 1) * 16
        )  # odd in cache lines
        for start, stop in bounds:
            panel, rows = buffer[: stop - start, : size - start], out[start:stop, start:]
            if self.beta:
                panel.copy_(rows)
            left, right = a[None, start:stop], a[None, start:].mT
            add_matmul_(panel.unsqueeze(0), left, right, self.beta, self.alpha)
            rows.copy_(panel)
            for first in range(start, stop, STRIP):
                end = min(first + STRIP, stop)
                out[end:, first:end] = panel[first - start : end - start, end - start :].T

    def _set_whole_(self, a: Tensor) -> None:
        """Set small matrices to ``alpha a a^T``, as half of it plus the transpose of that half."""
        for start, stop in _parts(self.out):
            target, part = self.out[start:stop], a[start:stop]
            half = target.new_empty(target.shape)
            add_matmul_(half, part, part.mT, 0.0, self.alpha / 2)
            torch.add(half, half.mT, out=target)

    def added(self) -> Update:
        """Return the update for further products, after ``beta`` has been applied."""
        return replace(self, beta=1.0, is_begun=True)

    def within(self, size: int) -> Update:
        """Return the update of the leading ``size`` rows and columns."""
        return replace(self, out=self.out[:, :size, :size])

    def set_(self, rows: Tensor, target: Tensor) -> None:
        """Update ``target``, a part of ``out``, with ``rows`` of its shape."""
        if self.beta == 0:
            target.copy_(rows).mul_(self.alpha)
        else:
            target.mul_(self.beta).add_(rows, alpha=self.alpha)


def _threads_of(a: Tensor) -> int:
    """Return how many threads share the product of ``a``, ``[g, D, L]``, with its transpose."""
    groups, size, length = a.shape
    return threads_for(a) if groups * size**2 * length >= SHARED_MACS else 1


def halves_are_faster(size: int, length: int, threads: int = 1) -> bool:
    """Return whether half of ``a a^T`` plus its transpose is faster than panels of rows.

    Two panels are not of one length, so threads do not share them evenly.
    """
    return size <= (2 * PANEL if length <= SHORT_SUM_TERMS or threads > 1 else PANEL)


def panels(size: int, device: str) -> list[int]:
    """Return the bounds of the panels of rows of the upper block triangle.

    Each is multiplied by its own and all later rows. On a CPU narrow panels save up to half of
    the multiplications of a full square; on other devices a product must be large to be fast.
    """
    return [*range(0, size, profile_of(device).panel_rows), size]


def threads_for_panels(size: int, threads: int) -> int:
    """Return how many threads share the panels of ``size`` rows about evenly."""
    return min(threads, 1 + size // SHARED_ROWS)


def _shares(bounds: list[Range], threads: int) -> list[list[Range]]:
    """Return panels of the upper triangle, whose rows become shorter, in equal shares."""
    shares: list[list[Range]] = [[] for _ in range(min(threads, len(bounds)))]
    stop = bounds[-1][1]
    for panel in bounds:
        least = min(shares, key=lambda own: sum((b - a) * (stop - a) for a, b in own))
        least.append(panel)
    return shares


def _parts(matrices: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the bounds of parts of a batch ``[g, D, D]`` that stay in a cache."""
    batch, rows, columns = matrices.shape
    is_cached = profile_of(matrices.device.type).is_cached
    count = max(1, DIAGONAL // (rows * columns)) if is_cached else batch
    for start in range(0, batch, count):
        yield start, start + count


def blocks_of(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """View ``[g, (ci *k), (ci' *k')]`` as ``[g, ci, *k, ci', *k']``."""
    rows = torch.unflatten(factor, 1, (-1, *kernel))
    return torch.unflatten(rows, rows.ndim - 1, (-1, *kernel))


def copy_upper_to_lower_(matrices: Tensor) -> None:
    """Copy the upper triangle of ``[g, D, D]`` to the lower one."""
    copy_transposed_panel_(matrices, 0, matrices.shape[-1])
    average_diagonal_blocks_(matrices)


def copy_transposed_block_(matrices: Tensor, rows: slice, columns: slice) -> None:
    """Copy the transpose of a block above the diagonal below it, in strips that stay in a cache."""
    for start in range(rows.start, rows.stop, PANEL):
        strip = slice(start, min(start + PANEL, rows.stop))
        matrices[:, columns, strip] = matrices[:, strip, columns].mT


def copy_transposed_panel_(matrices: Tensor, start: int, stop: int) -> None:
    """Copy the transpose of a panel of rows, without its diagonal blocks, below these blocks."""
    width = strip_width(matrices)
    for first in range(start, stop, width):
        end = min(first + width, stop)
        if end < matrices.shape[-1]:
            matrices[:, end:, first:end] = matrices[:, first:end, end:].mT


def average_diagonal_blocks_(matrices: Tensor) -> None:
    """Set the blocks on the diagonal to the mean of both triangles."""
    width, size = strip_width(matrices), matrices.shape[-1]
    whole = size // width
    batch, row, column = matrices.stride()
    blocks = matrices.as_strided(
        (matrices.shape[0], whole, width, width),
        (batch, width * (row + column), row, column),
        matrices.storage_offset(),
    )
    for start, stop in _parts(matrices[:, :width, : whole * width]) if whole else ():
        diagonal = blocks[start:stop]
        torch.mul(diagonal + diagonal.mT, 0.5, out=diagonal)
    if size % width:
        rest = matrices[:, whole * width :, whole * width :]
        torch.mul(rest + rest.mT, 0.5, out=rest)


def strip_width(matrices: Tensor) -> int:
    """Return the width of the blocks on the diagonal of ``[g, D, D]``."""
    return profile_of(matrices.device.type).strip_rows


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a factor of inputs of this dtype: at least float32.

    Raises:
        ValueError: If the dtype is not a real floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"The layer's tensors must be real floating-point numbers, got {dtype}.")
    return torch.promote_types(dtype, torch.float32)


def prepare(like: Tensor, shape: tuple[int, int], target: Target) -> Update:
    """Return the update of a target, or of a new tensor, for factors ``[g, D, D]``.

    Args:
        like: The tensor whose dtype and device decide those of the factor.
        shape: Number of groups and size ``D``.
        target: The tensor to update, if any, with ``beta`` and ``alpha``.

    Raises:
        ValueError: If ``out`` has another shape, dtype or device or is not contiguous, or
            if there is a ``beta`` but no ``out``.
    """
    out, beta, alpha = target.out, target.beta, target.alpha
    groups, size = shape
    expected = (groups, size, size)
    dtype = accumulation_dtype(like.dtype)
    if out is None:
        if beta:
            raise ValueError(f"`beta` must be 0 without `out`, got {beta}.")
        return Update(new_matrices(like, expected, dtype), 0.0, alpha)
    if out.shape != expected or not out.is_contiguous():
        raise ValueError(f"`out` must be contiguous of shape {expected}, got {tuple(out.shape)}.")
    if out.dtype != dtype or out.device != like.device:
        raise ValueError(
            f"`out` must be {dtype} on {like.device}, got {out.dtype} on {out.device}."
        )
    return Update(out, beta, alpha)
