"""The problem of an input factor: all that decides how it is computed, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from einconv_kfac.curvature.devices.device_registry import profile_of
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

    @property
    def profile(self) -> DeviceProfile:
        """The profile of the device."""
        return profile_of(self.device)

    def matmul_price(self, width: float | None = None) -> float:
        """Return the relative price of a multiplication; see `DeviceProfile.matmul_price`."""
        return self.profile.matmul_price(self.dtype, width)
