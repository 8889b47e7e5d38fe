"""Which rows of a layer's call belong to which example.

The first dimension of a call is usually that of the examples, but not in layouts with the time
first, in flattened sequences, or where examples share rows (position ids ``[1, l]``, learned
queries). A probe shows it: the gradient of one example's output is zero in the rows of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall

SHARED_PART = 0.25
"""Least part of the gradients of two examples that meets in the same rows, if they share these."""

MIXING_RATIO = 2.0
"""Least ratio of the gradient in an example's own row to that in the row of another, for layers
that mix examples, such as batch normalisation."""


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
    layouts: list[ExampleLayout] = [FIRST, *(Dimension(index) for index in inner)]
    layouts += [Flattened(example_first=True), Flattened(example_first=False)]
    return [e for e in layouts if e.fits(x_shape, examples) and e.fits(y_shape, examples)]


def probes(outputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield random vectors at the outputs, of the first and of the second example alone.

    Args:
        outputs: Tensors like the outputs, ``[n, ...]``.
    """
    generator = Generator().manual_seed(0)
    drawn = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    for example in range(2):
        yield [only(vector, example) for vector in drawn]


def bit_probes(
    outputs: Sequence[Tensor], examples: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield, for each bit of the examples' numbers, vectors of those with and without it."""
    generator = Generator().manual_seed(1)
    drawn = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    for bit in range((examples - 1).bit_length()):
        yield _of_bit(drawn, bit, 1), _of_bit(drawn, bit, 0)


def _of_bit(vectors: Sequence[Tensor], bit: int, value: int) -> list[Tensor]:
    """Return vectors ``[n, ...]`` that are zero for examples with another bit in their number."""
    own = []
    for vector in vectors:
        if not vector.ndim:  # of all examples
            own.append(vector)
            continue
        numbers = torch.arange(len(vector), device=vector.device)
        mask = ((numbers >> bit) & 1 == value).reshape(-1, *[1] * (vector.ndim - 1))
        own.append(torch.where(mask, vector, torch.zeros_like(vector)))
    return own


def only(vector: Tensor, example: int) -> Tensor:
    """Return a vector that is zero for all examples but one."""
    result = torch.zeros_like(vector)
    if vector.ndim and example < len(vector):
        result[example] = vector[example]
    return result


def found_layout(
    call: LayerCall, gradients: Sequence[Tensor], examples: int, *, mixes: bool
) -> ExampleLayout | None:
    """Return the layout of a call, or ``None`` if its rows are shared between examples.

    Args:
        call: The call.
        gradients: The gradients at its output for the two `probes`.
        examples: The number of examples.
        mixes: Whether the model normalises over the batch, so that rows of other examples have
            gradients as well.
    """
    possible = candidates(call.x.shape, call.y_shape, examples)
    for layout in possible:
        shares = [_shares(layout, gradient, examples) for gradient in gradients]
        others = [total - float(own[i]) for i, (total, own) in enumerate(shares)]
        if all(other <= 0 for other in others):
            return layout
    if FIRST in possible:
        if mixes:
            return FIRST
        (_, first), (_, second) = [_shares(FIRST, gradient, examples) for gradient in gradients]
        if first[0] > MIXING_RATIO * second[0] and second[1] > MIXING_RATIO * first[1]:
            return FIRST
    rows = -1 if call.has_free_positions else 1
    first, second = [_row_shares(gradient, rows) for gradient in gradients]
    return None if float(torch.minimum(first, second).sum()) >= SHARED_PART else SCATTERED


def meets(call: LayerCall, one: Tensor, other: Tensor) -> bool:
    """Return whether two gradients at a call are nonzero in the same rows."""
    rows = -1 if call.has_free_positions else 1
    return bool(torch.minimum(_row_shares(one, rows), _row_shares(other, rows)).any())


def _row_shares(gradient: Tensor, end: int) -> Tensor:
    """Return the part of each row, ``shape[:end]``, in a squared gradient."""
    squares = gradient.detach().double().abs().square()
    rows = squares.reshape(*squares.shape[:end], -1).sum(-1).flatten()
    return rows / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)


def _shares(layout: ExampleLayout, gradient: Tensor, examples: int) -> tuple[float, Tensor]:
    """Return the number of rows of all, and the part of each example, in a squared gradient."""
    rows = layout.by_example(gradient, examples).double().abs().square()
    own = rows.flatten(1).sum(1)
    own = own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)
    return float(own.sum()), own


def parts(
    tensor: Tensor, layout: ExampleLayout, examples: int, *, has_free_positions: bool
) -> list[Tensor]:
    """Return a tensor of a call as tensors whose first dimension is that of the examples.

    Args:
        tensor: The input, the output or a gradient at it.
        layout: The layout.
        examples: The number of examples.
        has_free_positions: Whether one tensor may hold all positions; they are split otherwise.
    """
    if layout == FIRST:
        return [tensor]
    whole = layout.by_example(tensor, examples)
    if whole.ndim == tensor.ndim or has_free_positions:
        return [whole]
    return list(whole.unbind(1))
