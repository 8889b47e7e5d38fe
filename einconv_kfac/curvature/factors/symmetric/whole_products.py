"""Products ``a a^T`` that are computed whole, since copying half of the result would take longer.

These are small products, and those with few columns. oneDNN adds the terms of all sums in the same
order, at least of short ones, so that ``a a^T`` is symmetric to the last bit. MKL often does not.
The order depends on shapes and addresses, not on values. So each shape is tested once, on random
numbers, for which another order changes the result.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import (
    SHORT_SUM_TERMS,
    add_matmul_,
    is_for_one_dnn,
    product,
)

CACHED_ROW_ELEMENTS = 1 << 18
"""Elements of the rows that are computed at a time, so that they stay in a cache."""

FEWEST_ROWS_AT_ONCE = 64
"""Smallest number of rows that are computed at a time."""

SMALL_PRODUCT_MULTIPLICATIONS = 3 << 24
"""Multiplications up to which half of them cost less than the calls that would save them."""

REUSED_MEMORY_BYTES = 1 << 25
"""Largest result in bytes whose memory the C library reuses after it is freed."""


def is_symmetric_by_itself(out: Tensor, a: Tensor, alpha: float) -> bool:
    """Return whether `add_whole_` keeps a symmetric matrix symmetric to the last bit.

    Args:
        out: The matrix, ``[1, D, D]``; for batches of several the answer is no.
        a: The factor of the product, ``[1, D, L]``.
        alpha: Multiplier of the product.
    """
    if type(out) is not Tensor or len(out) > 1 or alpha < 0 or not _is_short(a):
        return False
    return _is_symmetric(a.shape[1], a.shape[2], out.stride(1), torch.get_num_threads())


def _is_short(a: Tensor) -> bool:
    """Return whether oneDNN computes ``a a^T``, for ``a`` of shape ``[1, D, L]``, as a whole."""
    plain = type(a) is Tensor and not torch.compiler.is_compiling()
    small = (
        a.shape[2] <= SHORT_SUM_TERMS
        or a.shape[1] ** 2 * a.shape[2] <= SMALL_PRODUCT_MULTIPLICATIONS
    )
    return plain and small and is_for_one_dnn(a, a.mT)


@lru_cache(maxsize=1024)
def _is_symmetric(size: int, length: int, pitch: int, threads: int) -> bool:
    """Test a shape on random numbers; ``threads`` is a key of the cache only."""
    a = torch.randn(1, size, length, generator=torch.Generator().manual_seed(0))
    out = a.new_empty(1, size, pitch)[..., :size] if pitch else None
    if out is None:
        out = product(a, a.mT)
    else:
        add_whole_(out, a, 0.0, 0.3)
    return torch.equal(out, out.mT)


def new_whole(a: Tensor, alpha: float) -> Tensor | None:
    """Return ``alpha a a^T`` in the memory that oneDNN allocated, or none if a copy is faster.

    The memory of larger results is new each time, and faster in large pages; see `allocation`.

    Args:
        a: The factor of the product, ``[g, D, L]``.
        alpha: Multiplier of the product.
    """
    large = 4 * a.shape[1] ** 2 > REUSED_MEMORY_BYTES
    if len(a) > 1 or large or alpha < 0 or not _is_short(a):
        return None
    if not _is_symmetric(a.shape[1], a.shape[2], 0, torch.get_num_threads()):
        return None
    a = _scaled(a, alpha)
    return product(a, a.mT)


def add_whole_(out: Tensor, a: Tensor, beta: float, alpha: float) -> None:
    """Set all of ``out`` to ``beta out + alpha a a^T``, some rows at a time."""
    a, size = a.contiguous(), a.shape[1]
    step = max(FEWEST_ROWS_AT_ONCE, CACHED_ROW_ELEMENTS // size)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        add_matmul_(out[:, rows], a[:, rows], a.mT, beta, alpha, size)


def _scaled(a: Tensor, alpha: float) -> Tensor:
    """Return ``sqrt(alpha) a``, stored by rows; its product with itself stays symmetric."""
    return (a.mT * sqrt(alpha)).mT.contiguous()
