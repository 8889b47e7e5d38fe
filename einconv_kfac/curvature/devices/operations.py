"""Operations that are prepared by one thread and run by another.

A call of a view takes about as long as a small product, and only one thread at a time runs
Python. So a task's views and buffers are made before it starts; what its thread runs are products
and copies alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

Operation = Callable[[], object]
"""An operation whose tensors are given: it may run several times, and on any thread."""


def run(operations: Sequence[Operation]) -> None:
    """Run operations in order."""
    for operation in operations:
        operation()


class Scratch:
    """Memory that operations of one task share: what one wrote is overwritten by a later one."""

    def __init__(self) -> None:
        """Own no memory."""
        self._made: dict[Hashable, Tensor] = {}

    def empty(
        self, shape: Sequence[int], like: Tensor, use: Hashable, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor of a shape; those of the same use share the memory.

        Args:
            shape: The shape.
            like: A tensor on its device, by default with its dtype.
            use: What it is for. Two tensors that are needed at the same time have two uses.
            dtype: The dtype.
        """
        size, memory = prod(shape), self._made.get(use)
        if memory is None or memory.numel() < size:
            memory = self._made[use] = like.new_empty(size, dtype=dtype)
        return memory[:size].view(*shape)


def flattened(
    x: Tensor, start: int, stop: int, scratch: Scratch, use: str
) -> tuple[Tensor, list[Operation]]:
    """Return ``x.flatten(start, stop)``, and the copy that it takes where it is no view."""
    if _is_one_range(x, start, stop % x.ndim):
        return x.flatten(start, stop), []
    copy = scratch.empty(x.shape, x, use)
    return copy.flatten(start, stop), [partial(copy.copy_, x)]


def _is_one_range(x: Tensor, start: int, stop: int) -> bool:
    """Return whether the elements of some dimensions have one distance in memory."""
    dims = [i for i in range(start, stop + 1) if x.shape[i] != 1]
    return all(x.stride(i) == x.stride(j) * x.shape[j] for i, j in pairwise(dims))
