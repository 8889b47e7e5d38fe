"""The problem of an input factor: all that decides how it is computed, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import LOW_PRECISION
from einconv_kfac.curvature.devices.profile import DeviceProfile
from einconv_kfac.geometry import Geometry


@dataclass(frozen=True)
class Problem:
    """The input factor of a convolution, without the bias' row and column.

    Args:
        geometry: The convolution.
        batch: Number of examples ``N``.
        channels: Input channels per group.
        dtype: The input's dtype.
        device: The input's device type.
        tf32: Whether products in float32 are rounded to TF32.
        threads: Number of threads that may compute parts of it at the same time.
        tasks: Number of tasks at the same time of which this is one; they share a cache.
        shares: Number of tasks into which an algorithm divides it in its own way.
    """

    geometry: Geometry
    batch: int
    channels: int
    dtype: torch.dtype
    device: str
    tf32: bool = False
    threads: int = 1
    tasks: int = 1
    shares: int = 1

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """The hash, which look-ups in caches take for every factor."""
        numbers = self.batch, self.channels, self.dtype, self.device, self.tf32
        return hash((self.geometry, *numbers, self.threads, self.tasks, self.shares))

    @cached_property
    def entries(self) -> int:
        """Number of kernel entries ``K``."""
        return prod(self.geometry.kernel_size)

    @cached_property
    def size(self) -> int:
        """Rows of the factor: channels times kernel entries."""
        return self.channels * self.entries

    @cached_property
    def positions(self) -> int:
        """Number of output positions."""
        return self.geometry.positions

    @cached_property
    def inputs(self) -> int:
        """Number of elements of the input."""
        return self.batch * self.channels * self.geometry.groups * prod(self.geometry.input_size)

    @cached_property
    def outputs(self) -> int:
        """Number of elements of the factors."""
        return self.geometry.groups * self.size**2

    @cached_property
    def profile(self) -> DeviceProfile:
        """The profile of the device."""
        return profile_of(self.device)

    def mixed_price(self) -> float:
        """Return the relative price of a multiplication of operands in the input's own type."""
        low = self.dtype in LOW_PRECISION and self.profile.has_mixed_products
        return self.profile.mixed_mac_price if low else self.tf32_price()

    def tf32_price(self) -> float:
        """Return the relative price of a multiplication of operands in the factor's type."""
        return self.profile.tf32_mac_price if self.tf32 and self.dtype != torch.float64 else 1.0

    def matmul_price(self, width: float | None = None) -> float:
        """Return the relative price of a multiplication; see `DeviceProfile.matmul_price`."""
        return self.profile.matmul_price(self.dtype, width)


problem_of = lru_cache(maxsize=4096)(Problem)
"""Returns a problem; that of arguments that come again is the same object, with what it knows."""
