"""Which factor: everything that decides how it is computed, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from einconv_kfac.geometry import Geometry

APPROXIMATIONS = ("expand", "reduce")


@dataclass(frozen=True)
class Problem:
    """The input factor of a convolution, without the bias' row and column.

    Args:
        geometry: The convolution.
        batch: Number of examples ``N``.
        channels: Input channels per group.
        dtype: The input's dtype.
        device: The input's device type.
    """

    geometry: Geometry
    batch: int
    channels: int
    dtype: torch.dtype
    device: str

    @property
    def entries(self) -> int:
        """Number of kernel entries ``K``."""
        return prod(self.geometry.kernel_size)

    @property
    def size(self) -> int:
        """Rows of the factor: channels times kernel entries."""
        return self.channels * self.entries


def check_approximation(approximation: str) -> bool:
    """Return whether the approximation is ``"expand"``.

    Raises:
        ValueError: If it is not one of `APPROXIMATIONS`.
    """
    if approximation not in APPROXIMATIONS:
        raise ValueError(f"`approximation` must be one of {APPROXIMATIONS}, got {approximation!r}.")
    return approximation == "expand"


def chunks(x: Tensor, growth: float, limit: int = 1 << 20) -> Iterator[Tensor]:
    """Cut ``x`` along its first dimension where processing makes it ``growth`` times larger.

    Each part, once processed, has about ``limit`` elements, and at least one example.
    """
    per_example = max(1.0, growth * x[0].numel())
    step = max(1, int(limit / per_example))
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]
