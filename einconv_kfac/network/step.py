"""Steps that turn a tensor into another, as values: rewrites apply them to leaves and results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Split dimension ``dim`` into several; the last one runs fastest."""

    dim: int
    sizes: Shape

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        return shape[: self.dim] + self.sizes + shape[self.dim + 1 :]


@dataclass(frozen=True)
class Merge:
    """Flatten ``count`` adjacent dimensions, from ``dim`` on, into one."""

    dim: int
    count: int = 2

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        end = self.dim + self.count
        return (*shape[: self.dim], prod(shape[self.dim : end]), *shape[end:])


@dataclass(frozen=True)
class Drop:
    """Drop the unit dimension ``dim``."""

    dim: int

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        return shape[: self.dim] + shape[self.dim + 1 :]


@dataclass(frozen=True)
class Insert:
    """Insert a unit dimension in front of ``dim``."""

    dim: int

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        return (*shape[: self.dim], 1, *shape[self.dim :])


@dataclass(frozen=True)
class Narrow:
    """Keep ``length`` positions of dimension ``dim``, from ``start`` on."""

    dim: int
    start: int
    length: int

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Pad:
    """Add zeros to both ends of dimension ``dim``; negative numbers remove positions."""

    dim: int
    left: int
    right: int

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        padded = shape[self.dim] + self.left + self.right
        return (*shape[: self.dim], padded, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Windows:
    """View a dimension as windows of ``size`` positions ``dilation`` apart, every ``stride``."""

    dim: int
    size: int
    stride: int
    dilation: int = 1

    @property
    def span(self) -> int:
        """Number of positions from the first to the last of a window, both included."""
        return (self.size - 1) * self.dilation + 1

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step, ``[.., windows, size, ..]``."""
        count = 1 + (shape[self.dim] - self.span) // self.stride
        return (*shape[: self.dim], count, self.size, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class Fold:
    """Sum overlapping windows, ``[.., windows, size, ..]`` at ``dim``, into one dimension.

    The adjoint of `Windows` of a dimension with ``length`` positions.
    """

    dim: int
    length: int
    stride: int
    dilation: int = 1

    def reshape(self, shape: Shape) -> Shape:
        """Return the shape after the step."""
        return (*shape[: self.dim], self.length, *shape[self.dim + 2 :])


VIEWS = (Split, Merge, Drop, Insert)
"""Steps that keep all entries in their order."""

Step: TypeAlias = Split | Merge | Drop | Insert | Narrow | Pad | Windows | Fold


def reshaped(shape: Shape, steps: Iterable[Step]) -> Shape:
    """Return the shape after the steps."""
    for step in steps:
        shape = step.reshape(shape)
    return shape
