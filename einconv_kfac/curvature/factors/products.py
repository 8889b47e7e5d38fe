"""Products of matrices, by the library that is fastest for them.

torch multiplies float32 matrices on x86 with Intel's MKL, which uses the full width of the
vector units on Intel's processors only. oneDNN, which comes with torch as well, does on
all: on others its products take half the time.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.factors.problem import Problem

WIDE = 64
"""Columns from which a product is worth the way to oneDNN and back."""

SLOW = 2.0
"""How much longer MKL's products take than oneDNN's, where its vectors are narrower."""


def add_matmul_(target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """Set ``target`` to ``beta target + alpha left right``, for batches of matrices."""
    if target.shape[0] > 1:
        target.baddbmm_(left, right, beta=beta, alpha=alpha)
    elif is_for_onednn(left, right):
        found = functional.linear(left[0].to_mkldnn(), right[0].mT).to_dense()
        if beta:
            target[0].mul_(beta).add_(found, alpha=alpha)
        else:
            torch.mul(found, alpha, out=target[0])
    else:
        target[0].addmm_(left[0], right[0], beta=beta, alpha=alpha)


def is_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN multiplies these matrices ``[1, m, k]`` and ``[1, k, n]`` faster."""
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and right.shape[-1] >= WIDE
        and right[0].mT.is_contiguous()
        and mkl_is_narrow()
    )


@lru_cache(maxsize=1)
def mkl_is_narrow() -> bool:
    """Return whether this is a processor on which oneDNN uses wider vectors than MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    information = Path("/proc/cpuinfo")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and information.is_file() and "GenuineIntel" not in information.read_text()


def mkl_price(problem: Problem) -> float:
    """Return what a multiplication by torch's ordinary product costs, relative to oneDNN's."""
    ordinary = problem.device != "cpu" or problem.dtype == torch.float64
    return SLOW if mkl_is_narrow() and not ordinary else 1.0
