"""Small products ``a a^T``, or of few columns, of which no half is copied: that would cost more.

oneDNN adds the terms of all sums in the same order, at least of short ones, so that ``a a^T`` comes
out symmetric to the last bit. MKL often does not. The order depends on shapes and places in memory,
not on numbers; each shape is tried once, on numbers of which any other order would show.
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

ROWS = 1 << 18
"""Elements of the rows that are made at a time, so that they stay in a cache."""

LEAST = 64
"""Rows that are made at a time at least."""

FEW = 3 << 24
"""Multiplications of which a part costs less than the calls that leave it out."""

KEPT = 1 << 25
"""Bytes of a result up to which the C library keeps freed memory for the next one."""


def is_symmetric_by_itself(out: Tensor, a: Tensor, alpha: float) -> bool:
    """Return whether `add_whole_` makes a symmetric matrix of a symmetric one.

    Args:
        out: The matrix, ``[1, D, D]``; batches of several are left to MKL.
        a: The factor of the product, ``[1, D, L]``.
        alpha: What the product is multiplied with.
    """
    if type(out) is not Tensor or len(out) > 1 or alpha < 0 or not _is_short(a):
        return False
    return _is_symmetric(a.shape[1], a.shape[2], out.stride(1), torch.get_num_threads())


def _is_short(a: Tensor) -> bool:
    """Return whether oneDNN makes ``a a^T`` for a plain ``a`` of shape ``[1, D, L]``."""
    plain = type(a) is Tensor and not torch.compiler.is_compiling()
    small = a.shape[2] <= SHORT_SUM_TERMS or a.shape[1] ** 2 * a.shape[2] <= FEW
    return plain and small and is_for_one_dnn(a, a.mT)


@lru_cache(maxsize=1024)
def _is_symmetric(size: int, length: int, pitch: int, threads: int) -> bool:
    """Try it on random numbers; ``threads`` only tells results apart."""
    a = torch.randn(1, size, length, generator=torch.Generator().manual_seed(0))
    out = a.new_empty(1, size, pitch)[..., :size] if pitch else None
    if out is None:
        out = product(a, a.mT)
    else:
        add_whole_(out, a, 0.0, 0.3)
    return torch.equal(out, out.mT)


def new_whole(a: Tensor, alpha: float) -> Tensor | None:
    """Return ``alpha a a^T`` as oneDNN made it, which saves a copy, or none if that is no gain.

    Larger results are new memory each time, which is better asked for in large pages.

    Args:
        a: The factor of the product, ``[g, D, L]``.
        alpha: What the product is multiplied with.
    """
    large = 4 * a.shape[1] ** 2 > KEPT
    if len(a) > 1 or large or alpha < 0 or not _is_short(a):
        return None
    if not _is_symmetric(a.shape[1], a.shape[2], 0, torch.get_num_threads()):
        return None
    a = _scaled(a, alpha)
    return product(a, a.mT)


def add_whole_(out: Tensor, a: Tensor, beta: float, alpha: float) -> None:
    """Set ``out`` to ``beta out + alpha a a^T``, all of it, some rows at a time."""
    a, size = a.contiguous(), a.shape[1]
    step = max(LEAST, ROWS // size)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        add_matmul_(out[:, rows], a[:, rows], a.mT, beta, alpha, size)


def _scaled(a: Tensor, alpha: float) -> Tensor:
    """Return ``sqrt(alpha) a`` by rows: both factors of the product, which stays symmetric."""
    return (a.mT * sqrt(alpha)).mT.contiguous()
