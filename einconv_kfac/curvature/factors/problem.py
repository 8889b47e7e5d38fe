"""Which factor: everything that decides how it is computed, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import is_double_pumped, mkl_is_narrow
from einconv_kfac.geometry import Geometry

BATCHED = 0.004
"""What one more matrix in a batched product costs, as a part of a call with eight operations."""

SCATTERED = 3
"""What copying or adding single elements costs, relative to whole rows."""

SMALL = 1 << 18
"""Elements that are not worth being processed in parts."""

NARROW_VECTORS = 2.0
"""How much longer large products take by MKL than by oneDNN, where its vectors are narrower."""

HALF_SPEED = 40
"""Width of a large product at half of MKL's full speed, where that is oneDNN's."""


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

    @property
    def inputs(self) -> int:
        """Number of elements of the input."""
        return self.batch * self.channels * self.geometry.groups * prod(self.geometry.input_size)

    @property
    def outputs(self) -> int:
        """Number of elements of the factors."""
        return self.geometry.groups * self.size**2


@dataclass(frozen=True)
class Cost:
    """What an algorithm does, by its shapes alone.

    Args:
        macs: Multiply-accumulates in matrix products.
        width: Rows and columns of these products.
        copied: Elements copied, masked or summed on the way to the products.
        written: Elements written to scattered places on the way from the products.
        calls: Operations started.
    """

    macs: float
    width: float
    copied: float
    written: float
    calls: float


def mkl_price(problem: Problem, width: float | None = None) -> float:
    """Return what a multiplication by torch's ordinary product costs, relative to oneDNN's.

    Where wide vectors are worth little, only large products cost as little by MKL; batches of
    small ones were fitted at the same price as elsewhere.

    Args:
        problem: The problem.
        width: Rows and columns of the products, if all are large.
    """
    ordinary = problem.device != "cpu" or problem.dtype == torch.float64
    if ordinary or not mkl_is_narrow():
        return 1.0
    return 1 + HALF_SPEED / width if width and is_double_pumped() else NARROW_VECTORS


def chunk_size(device: str, elements: int) -> int:
    """Return how many elements to make of an input of ``elements`` at a time.

    As many as fit a cache, or fill a device, but not more than the input has.
    """
    smallest, largest = (1 << 16, 1 << 20) if device == "cpu" else (1 << 22, 1 << 24)
    return min(max(elements, smallest), largest)


def chunk_count(problem: Problem, growth: float, limit: int | None = None) -> int:
    """Return into how many parts `chunks` cuts the input."""
    limit = chunk_size(problem.device, problem.inputs) if limit is None else limit
    per_example = max(1.0, growth * problem.inputs / problem.batch)
    return -(-problem.batch // max(1, int(limit / per_example)))


def chunks(x: Tensor, growth: float, limit: int | None = None) -> Iterator[Tensor]:
    """Cut ``x`` along its first dimension where processing makes it ``growth`` times larger.

    Each part, once processed, has about ``limit`` elements, and at least one example.
    """
    limit = chunk_size(x.device.type, x.numel()) if limit is None else limit
    step = max(1, int(limit / max(1.0, growth * x[0].numel())))
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def part_size(x: Tensor, growth: float) -> int:
    """Return how many examples of ``x`` to process at a time, at least two."""
    limit = max(SMALL, chunk_size(x.device.type, x.numel()) / growth)
    return max(2, int(limit / max(1, x[0].numel())))
