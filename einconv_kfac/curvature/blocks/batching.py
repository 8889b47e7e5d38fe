"""Decompositions of many matrices in few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST_BATCHED_DIMENSION = 64
"""Largest dimension of matrices that are decomposed in one batch: on a CPU, batches were 1.7 to 6
times faster up to 32x32, 1.2 times at 64x64, and up to 2.5 times slower beyond."""


def batched(
    function: Callable[..., tuple[Tensor, ...]], matrices: Sequence[Tensor], *rest: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Apply a function to each of many factors ``[g, d, d]`` or ``[g, d]``, small ones together.

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
    results: dict[int, tuple[Tensor, ...]] = {}
    for indices in alike.values():
        arguments = [[operand[index] for index in indices] for operand in (matrices, *rest)]
        if len(indices) == 1:
            results[indices[0]] = function(*(own for (own,) in arguments))
            continue
        sizes = [len(matrices[index]) for index in indices]
        parts = function(*(torch.cat(own) for own in arguments))
        results.update(zip(indices, zip(*(torch.split(part, sizes) for part in parts))))
    return [results[index] for index in range(len(matrices))]
