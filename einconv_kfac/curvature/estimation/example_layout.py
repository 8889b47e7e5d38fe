"""Which rows of a layer's call belong to which example.

The first dimension of a call is usually that of the examples, but not in layouts with the time
first, in flattened sequences, or where examples share rows (position ids ``[1, l]``, learned
queries). A probe shows it: the gradient of one example's output is zero in the rows of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ExampleLayout(Protocol):
    """How the examples are laid out in a tensor of a call."""

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Return whether a tensor of a shape can have this layout."""

    def by_example(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the tensor as ``[n, ...]``."""


@dataclass(frozen=True)
class Dimension:
    """The examples have a dimension of their own.

    Args:
        index: The dimension; the last one is that of features.
    """

    index: int

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """See `ExampleLayout`."""
        return len(shape) > self.index and shape[self.index] == examples

    def by_example(self, tensor: Tensor, examples: int) -> Tensor:
        """See `ExampleLayout`."""
        return tensor.movedim(self.index, 0)


@dataclass(frozen=True)
class Flattened:
    """The first dimension holds several rows of each example.

    Args:
        example_first: Whether the rows of an example are next to each other.
    """

    example_first: bool

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """See `ExampleLayout`."""
        return len(shape) > 0 and shape[0] > examples and shape[0] % examples == 0

    def by_example(self, tensor: Tensor, examples: int) -> Tensor:
        """See `ExampleLayout`."""
        if self.example_first:
            return tensor.reshape(examples, -1, *tensor.shape[1:])
        return tensor.reshape(-1, examples, *tensor.shape[1:]).movedim(1, 0)


@dataclass(frozen=True)
class Scattered:
    """Each row belongs to one example, but in no regular order, or only some have rows here."""

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """See `ExampleLayout`; it is taken where no other one fits."""
        return False

    def by_example(self, tensor: Tensor, examples: int) -> Tensor:
        """See `ExampleLayout`; all rows together stand for one example."""
        return tensor.unsqueeze(0)


FIRST = Dimension(0)
SCATTERED = Scattered()


def candidates(
    x_shape: Sequence[int], y_shape: Sequence[int], examples: int
) -> list[ExampleLayout]:
    """Return the layouts that a call with such shapes can have, the usual one first.

    Args:
        x_shape: The shape of its input.
        y_shape: The shape of its output.
        examples: The number of examples.
    """
    inner = range(1, min(len(x_shape), len(y_shape) - 1))
    inside: list[ExampleLayout] = [Dimension(index) for index in inner]
    flat: list[ExampleLayout] = [Flattened(example_first=first) for first in (True, False)]
    # a dimension of size 1 may be that of channels
    layouts = [FIRST, *flat, *inside] if examples == 1 else [FIRST, *inside, *flat]
    return [e for e in layouts if e.fits(x_shape, examples) and e.fits(y_shape, examples)]


def only(vector: Tensor, example: int) -> Tensor:
    """Return a vector that is zero for all examples but one."""
    result = torch.zeros_like(vector)
    if vector.ndim and example < len(vector):
        result[example] = vector[example]
    return result


def parts(
    tensor: Tensor, layout: ExampleLayout, examples: int, row_dim: int | None
) -> list[Tensor]:
    """Return a tensor of a call as tensors whose first dimension is that of the examples.

    Args:
        tensor: The input, the output or a gradient at it.
        layout: The layout.
        examples: The number of examples.
        row_dim: See `LayerRule`.
    """
    if layout == FIRST:
        return [tensor]
    whole = layout.by_example(tensor, examples)
    return [whole] if whole.ndim == tensor.ndim else calls_of(whole, row_dim)


def calls_of(rows: Tensor, row_dim: int | None) -> list[Tensor]:
    """Return rows ``[n, rows, ...]`` as one call that has them as positions, or as several calls.

    Args:
        rows: The rows of a call, by example.
        row_dim: See `LayerRule`.
    """
    return list(rows.unbind(1)) if row_dim is None else [rows.movedim(1, row_dim)]
