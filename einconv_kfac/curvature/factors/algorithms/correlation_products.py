"""Products of two blocks of channels at boxes of lags, as weight gradients of a convolution.

Views and buffers are made before any operation runs. The operations fill them, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.operations import Operation, Scratch
from einconv_kfac.curvature.factors.channels_last import channels_last_copies, is_ready
from einconv_kfac.curvature.factors.indices.correlation_calls import Call, Range, Spans
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Geometry


class CorrelationProducts:
    """The correlations of two blocks of channels: operations on views and buffers made before.

    Args:
        operands: The blocks of channels, ``[n, *i, g, c]``, or one for both.
        step: The number of examples at a time.
        geometry: The convolution.
        update: What to multiply with, and the dtype.
        scratch: Memory of the task.
    """

    def __init__(
        self,
        operands: list[Tensor],
        step: int,
        geometry: Geometry,
        update: Update,
        scratch: Scratch,
    ) -> None:
        self._geometry, self._alpha, self._scratch = geometry, update.alpha, scratch
        self._dtype, self._step = update.out.dtype, step
        self.begin: list[Operation] = []
        self._operands = operands
        if step >= len(operands[0]):
            self._operands, self.begin = self._channels_last(operands)

    def reserve(self, found: Iterable[Call]) -> None:
        """Reserve memory for the largest boxes, since each enlargement would be kept beside it."""
        sizes = {"left": 0, "right": 0}
        for call in found:
            count = len(self._operands[0])
            examples = min(self._step, count) if call.is_interior else count
            for use, ranges in ("left", call.left), ("right", call.right):
                sizes[use] = max(sizes[use], examples * prod(map(_length, ranges)))
        for (use, size), x in zip(sizes.items(), (self._operands[0], self._operands[-1])):
            self._scratch.empty((size, *x.shape[-2:]), x, use, self._dtype)

    def sums(self, found: list[Call]) -> dict[Spans, Tensor]:
        """Return buffers for the correlations ``[*r, *lag, g, c, c']`` of some calls."""
        first, last = self._operands[0], self._operands[-1]
        shapes = {call.spans: (*call.shape, *first.shape[-2:], last.shape[-1]) for call in found}
        return {
            spans: self._scratch.empty(shape, first, ("sums", i), self._dtype)
            for i, (spans, shape) in enumerate(shapes.items())
        }

    def operations(self, found: list[Call], sums: dict[Spans, Tensor]) -> Iterator[Operation]:
        """Yield the operations that compute the sums of some calls.

        Those of small regions are computed for all examples at once, those of the largest for
        some at a time.
        """
        yield from (total.zero_ for total in sums.values())
        borders = [call for call in found if not call.is_interior]
        yield from self._added(sums, borders, self._operands)
        interior, known = [call for call in found if call.is_interior], 0
        again: list[Operation] = []
        for start in range(0, len(self._operands[0]), self._step):
            own = [operand[start : start + self._step] for operand in self._operands]
            parts, copies = (own, []) if self.begin else self._channels_last(own)
            if not copies or len(own[0]) != known:
                again, known = self._added(sums, interior, parts), len(own[0])
            yield from copies
            yield from again

    def _channels_last(self, operands: list[Tensor]) -> tuple[list[Tensor], list[Operation]]:
        """Return operands with the channels last, and the copies that it takes."""
        found: list[Tensor] = []
        operations: list[Operation] = []
        for operand in operands:
            found.append(operand)
            if not is_ready(operand, self._dtype):
                use = "operand", len(found)
                found[-1] = self._scratch.empty(operand.shape, operand, use, self._dtype)
                operations += channels_last_copies(found[-1], operand)
        return found, operations

    def _added(
        self, sums: dict[Spans, Tensor], found: list[Call], operands: list[Tensor]
    ) -> list[Operation]:
        """Return the operations that add the correlations of regions to their sums."""
        operations: list[Operation] = []
        for call in found:
            left, copies = self._box(operands[0], call.left, "left")
            right, others = self._box(operands[-1], call.right, "right")
            target = sums[call.spans][call.slot]
            operations += [*copies, *others, self._addition(target, left, right, call.lags)]
        return operations

    def _addition(
        self, target: Tensor, left: Tensor, right: Tensor, lags: tuple[int, ...]
    ) -> Operation:
        """Return the operation that adds correlations to ``target``, ``[*lag, g, c, c']``."""
        if prod(lags) == 1 and left.shape[1:-2] == right.shape[1:-2]:
            here, there = (x.flatten(0, -3).movedim(1, 0) for x in (left, right))  # g t c
            shape = (len(here), here.shape[2], there.shape[2])
            return partial(_add_product_, target.view(shape), here.mT, there, self._alpha)
        target = target.movedim((-3, -2, -1), (0, 1, 2)).flatten(0, 1)  # (g c) c' *lag
        left, right = (x.flatten(-2).movedim(-1, 1) for x in (left, right))
        sizes = (left.shape[1], *lags, right.shape[1] // self._geometry.groups)
        weight = left.new_empty(sizes).movedim(-1, 1)  # of the operands' format, not to be copied
        return partial(_add_gradient_, target, left, right, weight, self._geometry, self._alpha)

    def _box(
        self, x: Tensor, ranges: tuple[Range, ...], use: str
    ) -> tuple[Tensor, list[Operation]]:
        """Return a box of ``x``, ``[n, *i, g, c]``, with zeros where it leaves ``x``."""
        sizes = x.shape[1:-2]
        inside: tuple[Any, ...] = tuple(
            slice(max(0, start), min(size, stop), step)
            for (start, stop, step), size in zip(ranges, sizes)
        )
        part = x[(slice(None), *inside)]
        lengths = tuple(map(_length, ranges))
        if part.shape[1:-2] == lengths and is_ready(part, self._dtype):
            return part, []
        shape = (len(x), *lengths, *x.shape[-2:])
        target = box = self._scratch.empty(shape, x, use, self._dtype)
        operations: list[Operation] = []
        for dim, (start, size) in enumerate(zip((a for a, *_ in ranges), part.shape[1:]), start=1):
            before = max(0, -start)
            ends = (
                box.narrow(dim, 0, before),
                box.narrow(dim, before + size, box.shape[dim] - before - size),
            )
            operations += [end.zero_ for end in ends if end.numel()]
            target = target.narrow(dim, before, size)
        return box, [*operations, *channels_last_copies(target, part)]


def _length(positions: Range) -> int:
    """Return the number of positions of a range."""
    start, stop, step = positions
    return -(-(stop - start) // step)


def _add_product_(target: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add ``alpha left right`` for batches of matrices."""
    target.add_(left @ right, alpha=alpha)


def _add_gradient_(
    target: Tensor, left: Tensor, right: Tensor, weight: Tensor, geometry: Geometry, alpha: float
) -> None:
    """Add ``alpha sum_{n,t} left[n, (g c), t] right[n, (g c'), t S + l D]``, ``[(g c), c', *l]``.

    Args:
        target: What to add to.
        left: The output gradient.
        right: The input.
        weight: A tensor like the weight, whose entries do not matter.
        geometry: The convolution.
        alpha: Multiplier.
    """
    zero = [0] * geometry.ndim
    found: Tensor = torch.ops.aten.convolution_backward(
        left, right, weight, None, geometry.stride, zero, geometry.dilation, False, zero,
        geometry.groups, [False, True, False],
    )[1]  # fmt: skip
    target.add_(found, alpha=alpha)
