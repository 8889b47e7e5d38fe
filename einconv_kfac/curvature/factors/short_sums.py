"""Products ``a a^T`` of few columns, whose cost is that of writing the result: no half is copied.

oneDNN adds short sums one after the other, and all in the same order, so that ``a a^T`` comes out
symmetric to the last bit. MKL often does not. The order depends on shapes and places in memory,
not on numbers; each shape is tried once, on numbers of which any other order would show.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.products import SHORT, add_matmul_, is_for_one_dnn

ROWS = 1 << 17
"""Elements of the rows that are made at a time, so that they stay in a cache."""

LEAST = 64
"""Rows that are made at a time at least."""


def is_symmetric_by_itself(out: Tensor, a: Tensor) -> bool:
    """Return whether `add_whole_` makes a symmetric matrix of a symmetric one.

    Args:
        out: The matrix, ``[1, D, D]``; batches of several are left to MKL.
        a: The factor of the product, ``[1, D, L]``.
    """
    plain = type(out) is Tensor and not torch.compiler.is_compiling()
    if not plain or len(out) > 1 or a.shape[2] > SHORT or not is_for_one_dnn(a, a.mT):
        return False
    return _is_symmetric(a.shape[1], a.shape[2], out.stride(1), torch.get_num_threads())


@lru_cache(maxsize=1024)
def _is_symmetric(size: int, length: int, pitch: int, threads: int) -> bool:
    """Try it on random numbers; ``threads`` only tells results apart."""
    a = torch.randn(1, size, length, generator=torch.Generator().manual_seed(0))
    out = a.new_empty(1, size, pitch)[..., :size]
    add_whole_(out, a, 0.0, 0.3)
    return torch.equal(out, out.mT)


def add_whole_(out: Tensor, a: Tensor, beta: float, alpha: float) -> None:
    """Set ``out`` to ``beta out + alpha a a^T``, all of it, some rows at a time."""
    a, size = a.contiguous(), a.shape[1]
    step = max(LEAST, ROWS // size)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        add_matmul_(out[:, rows], a[:, rows], a.mT, beta, alpha, size)
