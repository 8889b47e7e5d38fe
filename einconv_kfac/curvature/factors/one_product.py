"""Factors whose columns exist in memory, as one product of all of them.

Small products take less time than the calls that would save half of their multiplications, and
with few rows there is little to save. With several threads, torch divides one product evenly, and
the panels of an upper triangle less so. What has to be decided depends on shapes alone, so it is
decided once for each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import ONEDNN_LEAST_MACS
from einconv_kfac.curvature.devices.threads import threads_for
from einconv_kfac.curvature.factors.symmetric.allocation import new_matrices
from einconv_kfac.curvature.factors.symmetric.update import (
    Target,
    copy_upper_to_lower_,
    threads_for_panels,
)

DTYPES = (torch.float32, torch.float64)
"""The dtypes whose inputs enter products as they are."""

FEW_ROWS = 192
"""Rows of a factor up to which half of the multiplications are not worth the calls."""

FEW_ROWS_MACS_PER_THREAD = 1 << 23
"""Multiplications of few rows for each thread above which panels by oneDNN are faster.

They are computed on one thread. One product by MKL needs fewer calls, and threads share it.
"""

MACS_PER_THREAD = 1 << 28
"""Multiplications for each thread up to which one product is no slower than its panels."""

CACHED_ROWS = 800
"""Rows of a factor up to which it stays in a cache, where half of it is added to the transpose."""

ROWS_PER_COLUMN = 2
"""Rows per column up to which copying a larger factor takes less time than multiplying."""

FEW_EXAMPLES = 16
"""Examples up to which their products, one call for each, are added without a copy."""

LONG_EXAMPLE_POSITIONS = 64
"""Positions above which the same is true for any number of examples."""

BATCHED_ROWS = 64
"""Rows up to which the products of all examples are computed at once and then added."""

BATCHED_ROWS_OF_THREADS = 192
"""The same with several threads, which divide the examples among themselves."""


def is_one_product(like: Tensor, examples: int, size: int, positions: int) -> bool:
    """Return whether the factor of columns ``[n, d, s]`` of a tensor's kind is one product."""
    if not (type(like) is Tensor and like.dtype in DTYPES):
        return False
    single, threads = like.dtype == torch.float32, threads_for(like)
    return _is_fastest(like.device.type, single, size, examples * positions, threads)


@lru_cache(maxsize=4096)
def _is_fastest(device: str, single: bool, size: int, columns: int, threads: int) -> bool:
    """Return whether one product with ``columns`` terms in each sum is faster than panels."""
    profile, macs = profile_of(device), size**2 * columns
    if not profile.is_host or size > max(CACHED_ROWS, ROWS_PER_COLUMN * columns):
        return False
    is_small = macs < ONEDNN_LEAST_MACS
    is_small |= size <= FEW_ROWS and macs <= FEW_ROWS_MACS_PER_THREAD * threads
    if profile.multiplies_by_onednn and single and not is_small:
        return False
    is_shared = 2 * threads_for_panels(size - 1, threads) <= threads
    return macs > 0 and (size <= FEW_ROWS or macs <= MACS_PER_THREAD * threads or is_shared)


def one_product(a: Tensor, target: Target, bias: bool = False) -> Tensor | None:
    """Return ``beta out + alpha sum_{n,s} a a^T``, or none if ``out`` does not fit.

    Args:
        a: Columns of shape ``[n, d, s]`` that `is_one_product` accepts.
        target: The factor ``[1, d, d]`` to update, if any, with ``beta`` and ``alpha``.
        bias: Whether each column ends in a constant 1, which counts in ``d``.
    """
    out, size = target.out, a.shape[1] + bias
    if not (_fits(out, a, size) if out is not None else target.beta == 0):
        return None
    if size <= CACHED_ROWS:
        half = a.new_empty(size, size)
        _add_to_(half, a, 0.0, target.alpha / 2, bias)
        return _updated(out, target.beta, half)
    matrices = new_matrices(a, (1, size, size), a.dtype) if out is None else out
    _add_to_(matrices[0], a, target.beta, target.alpha, bias)
    copy_upper_to_lower_(matrices)
    return matrices


def batched_rows(a: Tensor) -> int:
    """Return up to how many rows the products of all examples are computed at once."""
    return BATCHED_ROWS if threads_for(a) == 1 else BATCHED_ROWS_OF_THREADS


def _are_added(a: Tensor) -> bool:
    """Return whether the products of examples are added one by one, each in a call of its own.

    They are not where the columns of all examples have one pitch, nor with several threads, which
    would wait for each other after each call.
    """
    examples, _, positions = a.shape
    short = examples > FEW_EXAMPLES and positions <= LONG_EXAMPLE_POSITIONS
    return a.stride(0) > a.stride(1) and not short and threads_for(a) == 1


def _updated(out: Tensor | None, beta: float, half: Tensor) -> Tensor:
    """Return ``beta out`` plus a matrix and its transpose, symmetric to the last bit."""
    if out is None:
        return (half + half.T).unsqueeze(0)
    if not beta:
        torch.add(half, half.T, out=out[0])
        return out
    return out.mul_(beta).add_(half + half.T)


def _add_to_(matrix: Tensor, a: Tensor, beta: float, alpha: float, bias: bool) -> None:
    """Set a matrix to ``beta matrix + alpha sum_{n,s} a a^T``, which autocast does not round.

    Columns that follow each other in memory are multiplied where they are, and few rows for all
    examples at once. Others are gathered, if they are not added example by example.
    """
    examples, size, positions = a.shape
    if positions == 1 or a.stride(1) == 1:
        rows = a.mT.reshape(-1, size).contiguous()  # products round by the layout as well
        rows = functional.pad(rows, (0, 1), value=1.0) if bias else rows
        matrix.addmm_(rows.T, rows, beta=beta, alpha=alpha)
    elif not (beta or bias) and size <= min(batched_rows(a), positions):
        products = torch.bmm(a, a.mT, out=a.new_empty(examples, size, size))
        torch.sum(products, 0, out=matrix).mul_(alpha)
    elif not bias and _are_added(a):
        matrix.addbmm_(a, a.mT, beta=beta, alpha=alpha)
    else:
        columns = a.movedim(0, 1)
        columns = torch.cat([columns, a.new_ones(1, examples, positions)]) if bias else columns
        columns = columns.flatten(1)
        matrix.addmm_(columns, columns.T, beta=beta, alpha=alpha)


def _fits(out: Tensor, a: Tensor, size: int) -> bool:
    """Return whether the factor of ``a`` can be added to ``out``."""
    same = out.dtype == a.dtype and out.device == a.device
    return same and out.shape == (1, size, size) and out.is_contiguous()
