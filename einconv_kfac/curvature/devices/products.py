"""Products of matrices, by the library that is fastest for them.

torch multiplies float32 matrices on x86 with Intel's MKL, which uses the full width of the
vector units on Intel's processors only. oneDNN, the library of torch's convolutions, does on
all: on others large products take half the time. It reads its operands where they are, unless
one has gaps between its rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

LARGE = 1 << 20
"""Multiplications from which on a product is worth the longer way to oneDNN."""

WIDE = 64
"""Rows and columns from which a product is worth reordering a transposed operand."""

ZEN_4 = 25
"""The number of AMD's last family of processors whose vectors are wider than what computes."""

SHORT = 64
"""Length of the sums up to which a product costs no more than writing its result."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix products ``[g, m, k] @ [g, k, n]``."""
    multiply = _one_dnn_for(left, right)
    if multiply is None:
        return left @ right
    left, right = (x if _is_dense(x) else x.contiguous() for x in (left, right))
    if len(left) == 1:
        return multiply(left[0], right[0].mT).unsqueeze(0)
    return torch.stack([multiply(a, b.mT) for a, b in zip(left, right)])


def add_matmul_(
    target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, rows: int = 0
) -> None:
    """Set ``target`` to ``beta target + alpha left right``, for batches of matrices.

    Operands are not copied to be multiplied faster, nor results of short sums, unless these are
    a part that fits a cache of a product with more ``rows``; all parts are then alike.
    """
    if len(target) > 1:
        target.baddbmm_(left, right, beta=beta, alpha=alpha)
        return
    worthwhile = (rows or left.shape[-1] > SHORT) and _is_dense(left) and _is_dense(right)
    multiply = _one_dnn_for(left, right, rows) if worthwhile else None
    if multiply is None:
        target[0].addmm_(left[0], right[0], beta=beta, alpha=alpha)
    elif beta:
        target[0].mul_(beta).add_(multiply(left[0], right[0].mT), alpha=alpha)
    else:
        torch.mul(multiply(left[0], right[0].mT), alpha, out=target[0])


def _one_dnn_for(
    left: Tensor, right: Tensor, rows: int = 0
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return ``x, w -> x @ w.T`` by oneDNN where that is faster."""
    return _by_one_dnn if is_for_one_dnn(left, right, rows) else None


def is_for_one_dnn(left: Tensor, right: Tensor, rows: int = 0) -> bool:
    """Return whether oneDNN makes a product, or a part of one with ``rows``, faster.

    It has no derivatives.
    """
    rows, columns = rows or left.shape[1], right.shape[2]
    large = rows * columns * left.shape[2] >= LARGE
    large = large and (left.is_contiguous() or min(rows, columns) >= WIDE)
    single = left.dtype == right.dtype == torch.float32 and left.device.type == "cpu"
    enabled = bool(torch.backends.mkldnn.enabled) and not torch.is_grad_enabled()
    return large and single and enabled and mkl_is_narrow()


def _by_one_dnn(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x @ w.T``."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return found


def _is_dense(matrices: Tensor) -> bool:
    """Return whether matrices have no gaps in memory, with which oneDNN is very slow."""
    return matrices.is_contiguous() or matrices.mT.is_contiguous()


@lru_cache(maxsize=1)
def is_double_pumped() -> bool:
    """Return whether this is one of AMD's processors before Zen 5.

    They compute with each half of a wide vector in turn, so that width is worth little.
    """
    processor = _processor()
    family = re.search(r"cpu family\s*:\s*(\d+)", processor)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) <= ZEN_4


@lru_cache(maxsize=1)
def mkl_is_narrow() -> bool:
    """Return whether this is a processor on which oneDNN uses wider vectors than MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    processor = _processor()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    other = bool(processor) and "GenuineIntel" not in processor
    return wide and known and other


def _processor() -> str:
    """Return what the operating system tells of the processor, nothing if it has no such file."""
    information = Path("/proc/cpuinfo")
    return information.read_text() if information.is_file() else ""
