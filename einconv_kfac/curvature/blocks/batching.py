"""Decompositions of many matrices in few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.concurrent_calls import concurrent

LARGEST_BATCHED_DIMENSION = 64
"""Largest dimension of matrices that are decomposed in one batch: on a CPU, batches were 1.7 to 6
times faster up to 32x32, 1.2 times at 64x64, and up to 2.5 times slower beyond."""


def batched(
    function: Callable[..., tuple[Tensor, ...]], matrices: Sequence[Tensor], *rest: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Apply a function to each of many factors ``[g, d, d]`` or ``[g, d]``, small ones together.

    On a GPU all calls are made at once, see `concurrent`.

    Args:
        function: A function of matrices, and of more tensors. The first dimension of all its
            results is that of the groups.
        matrices: The factors; those of one shape that are small enough are passed in one call.
        rest: The other arguments, with the groups first.
    """
    alike: dict[object, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        size = matrix.shape[-1]
        small = size <= LARGEST_BATCHED_DIMENSION
        key = (matrix.shape[1:], matrix.dtype, matrix.device)
        alike[key if small else index].append(index)
    operands = [
        [_joined([operand[index] for index in indices]) for operand in (matrices, *rest)]
        for indices in alike.values()
    ]
    results: dict[int, tuple[Tensor, ...]] = {}
    for indices, parts in zip(alike.values(), concurrent(function, operands)):
        sizes = [len(matrices[index]) for index in indices]
        results.update(zip(indices, zip(*(torch.split(part, sizes) for part in parts))))
    return [results[index] for index in range(len(matrices))]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one, or the only one itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
