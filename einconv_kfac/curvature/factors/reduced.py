"""KFAC-reduce: average the windows first, then one small product."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.problem import Problem, chunks
from einconv_kfac.curvature.factors.update import Update
from einconv_kfac.geometry import Axis, Geometry


def averaged_pattern(axis: Axis, like: Tensor, transposed: bool = False) -> Tensor:
    """Return how often each kernel entry meets each position, over the number of positions.

    Args:
        axis: The dimension.
        like: A tensor of the wanted dtype and device.
        transposed: Whether the positions that are averaged over are the axis' inputs.

    Returns:
        The pattern averaged over its outputs, ``[i, k]``, or over its inputs, ``[o, k]``.
    """
    sizes = (axis.output_size, axis.input_size)
    kept, averaged = sizes if transposed else sizes[::-1]
    rows = [[0.0] * axis.kernel_size for _ in range(kept)]
    for k in range(axis.kernel_size):
        for o in axis.outputs(k):
            rows[o if transposed else axis.input_position(k, o)][k] = 1 / averaged
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def averages(x: Tensor, geometry: Geometry, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Return the windows' averages ``[n, (c k)]`` of ``x``, of shape ``[n, c, *i]``."""
    like = x.new_empty((), dtype=dtype)
    patterns = [averaged_pattern(axis, like, transposed) for axis in geometry.axes]
    parts = []
    for part in chunks(x, 1.0):
        mean = part.to(dtype)
        for pattern in reversed(patterns):  # *i (last first) -> .. *k
            mean = torch.tensordot(mean, pattern, dims=([1 + len(patterns)], [0]))
            mean = mean.movedim(-1, 2)
        parts.append(mean.flatten(1))
    return torch.cat(parts)


def reduced(mean: Tensor, problem: Problem, update: Update) -> None:
    """Add ``sum_n abar abar^T`` to the update, from the averages ``[n, (c k)]``."""
    rows = mean.reshape(-1, problem.geometry.groups, problem.size)
    update.add_product_(rows.permute(1, 2, 0))
    update.mirror_()
