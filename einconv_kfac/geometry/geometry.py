"""A convolution's hyper-parameters and sizes as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from einconv_kfac.geometry.axis import Axis
from einconv_kfac.geometry.spellings import LARGEST_POSITIONS, as_integer


@dataclass(frozen=True)
class Geometry:
    """A convolution: its axes, outermost first, and its number of channel groups.

    Raises:
        ValueError: If ``groups`` is not positive, there is no axis, or inputs or outputs have more
            than `LARGEST_POSITIONS` positions.
        TypeError: If ``groups`` is not an integer, or ``axes`` is not a tuple of `Axis`.
    """

    axes: tuple[Axis, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        as_integer(self.groups, "groups", minimum=1)
        if not isinstance(self.axes, tuple) or not all(isinstance(a, Axis) for a in self.axes):
            raise TypeError(f"`axes` must be a tuple of `Axis`, got {self.axes!r}.")
        if not self.axes:
            raise ValueError("`axes` must have at least one dimension, got ().")
        for name, sizes in (("input", self.input_size), ("output", self.output_size)):
            if all(type(size) is int for size in sizes) and prod(sizes) > LARGEST_POSITIONS:
                raise ValueError(
                    f"A convolution must have at most {LARGEST_POSITIONS} {name} positions over "
                    f"all dimensions, got {sizes}: lower its padding, dilation or stride, or the "
                    "size of its input."
                )

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.axes)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Number of input positions per dimension."""
        return tuple(axis.input_size for axis in self.axes)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Number of kernel entries per dimension."""
        return tuple(axis.kernel_size for axis in self.axes)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Number of output positions per dimension."""
        return tuple(axis.output_size for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per dimension."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per dimension."""
        return tuple(axis.dilation for axis in self.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Number of zeros left and right, per dimension."""
        return tuple(axis.padding for axis in self.axes)

    @property
    def exact_padding(self) -> tuple[tuple[int, int], ...]:
        """`Axis.exact_padding` per dimension."""
        return tuple(axis.exact_padding for axis in self.axes)

    @property
    def positions(self) -> int:
        """Number of output positions over all dimensions."""
        return prod(self.output_size)

    def split_channels(self, channels: int, name: str = "channels") -> int:
        """Return the channels per group.

        Raises:
            ValueError: If the groups do not divide the channels.
            TypeError: If the channels are not an integer.
        """
        as_integer(channels, name, minimum=0)
        if channels % self.groups:
            raise ValueError(f"`{name}` must be divisible by groups={self.groups}, got {channels}.")
        return channels // self.groups
