"""A plain product for kernels of one entry."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import operand_dtype
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.chunking import chunk_size, chunks
from einconv_kfac.curvature.factors.one_product import (
    BATCHED_ROWS,
    BATCHED_ROWS_OF_THREADS,
    batched_rows,
)
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.update import (
    Update,
    copy_upper_to_lower_,
    panels,
    threads_for_panels,
)
from einconv_kfac.geometry import Geometry

LONG_EXAMPLE_POSITIONS = 256
"""Positions from which the product of a single example is worth a call."""

LONG_ONEDNN_POSITIONS = 8192
"""Positions of a single example from which oneDNN's product is worth adding to the others."""

ONE_CALL_MACS = 1 << 24
"""Multiplications up to which one sum over few examples is no slower than a gathered copy."""

FEW_EXAMPLES = 16
"""Examples up to which a sum of their products, one call for each, is no slower."""

GATHERED_MACS = 3 << 24
"""Multiplications for which all examples are gathered at once."""


def add_columns_(x: Tensor, update: Update) -> None:
    """Add ``sum_{n,s} x x^T`` for ``x`` of shape ``[n, g, c, s]`` to the update.

    Where the examples do not follow each other in memory, long ones are multiplied one by
    one, which needs no copy, and short ones are gathered; so are those that oneDNN multiplies,
    where a product costs less than adding it up. As oneDNN copies them once more, half are
    gathered at a time, unless adding up large products costs more than that. The products of
    few channels are computed in one call.
    """
    profile, dtype = profile_of(x.device.type), operand_dtype(x, update.out.dtype)
    same, cached = x.dtype == dtype, profile.is_cached
    onednn = profile.multiplies_by_onednn and update.out.dtype == torch.float32
    is_long = x.shape[3] >= (LONG_ONEDNN_POSITIONS if onednn else LONG_EXAMPLE_POSITIONS)
    limit = chunk_size(x.device.type, x.numel())
    if x.stride(2) == 1 and same:
        limit = x.numel()  # channels last
    elif cached and same and _add_in_one_call_(x, update):
        return
    elif cached and is_long:
        limit = 1
    elif cached and x.numel() > update.out.numel() and x.numel() * x.shape[2] > GATHERED_MACS:
        limit = min(limit, -(-x.numel() // 2))
    parts = list(chunks(x, 1.0, limit))
    for part in parts:
        columns = part.to(dtype).movedim(0, 2).flatten(2)  # g c (n s)
        update.add_product_(columns, last=part is parts[-1])
        if part is not parts[-1]:
            del columns  # freed before the next ones are computed
            update = update.added()


def _add_in_one_call_(x: Tensor, update: Update) -> bool:
    """Add ``sum_{n,s} x x^T`` without gathering, where that is faster; return whether it was."""
    examples, groups, channels, positions = x.shape
    if channels == 1:
        norms = torch.linalg.vector_norm(x, dim=3, keepdim=True)
        update.set_(norms.square().sum(0), update.out)
        return True
    if groups > 1:
        return False
    x = x[:, 0]
    if channels <= min(batched_rows(x), positions):  # no more memory than the input
        update.set_(torch.bmm(x, x.mT).sum(0, keepdim=True), update.out)
    elif examples <= FEW_EXAMPLES and x.numel() * channels <= ONE_CALL_MACS:
        update.out[0].addbmm_(x, x.mT, beta=update.beta, alpha=update.alpha)
    else:
        return False
    copy_upper_to_lower_(update.out)
    return True


class Pointwise(Algorithm):
    """The product of the input with its transpose, for kernels of one entry."""

    name = "pointwise"
    rank = 6
    is_always_fastest = True

    def applies(self, problem: Problem) -> bool:
        """Return whether the kernel has one entry."""
        return all(axis.kernel_size == 1 for axis in problem.geometry.axes)

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        bounds = panels(problem.size, problem.device)
        pairs = sum((stop - start) * (problem.size - start) for start, stop in pairwise(bounds))
        columns = problem.batch * problem.geometry.positions * problem.geometry.groups
        calls = problem.batch * (3 + len(bounds))
        return Cost(pairs * columns, problem.size, 0.0, problem.outputs, calls, waits=1)

    def sharing(self, problem: Problem) -> float:
        """Return how many threads share the products of few channels, or the panels of one.

        Batched products are MKL's: where oneDNN is faster, threads gain half as much by them.
        """
        if problem.size <= BATCHED_ROWS:
            return problem.threads
        if problem.size <= BATCHED_ROWS_OF_THREADS:
            halved = problem.profile.multiplies_by_onednn
            return (problem.threads + 1) / 2 if halved else problem.threads
        return threads_for_panels(problem.size, problem.threads)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from positions that the entry meets."""
        met = met_entries(problem.geometry)
        x = x if met is None else x[met]
        groups, channels = problem.geometry.groups, problem.channels
        if max(problem.geometry.stride) > 1:  # copied once, all in a row
            x = torch.unflatten(x, 1, (groups, channels)).movedim(0, 2)  # g c n s
            x = x.flatten(2).unsqueeze(0)
        else:
            x = x.reshape(len(x), groups, channels, x.shape[2:].numel())
        add_columns_(x, update)


@lru_cache(maxsize=4096)
def met_entries(geometry: Geometry) -> tuple[Any, ...] | None:
    """Return the index of the positions that a kernel of one entry meets; ``None`` for all."""
    index: list[Any] = [...]
    for axis in geometry.axes:
        met = axis.outputs(0)
        start = axis.input_position(0, met.start)
        index.append(slice(start, start + (len(met) - 1) * axis.stride + 1, axis.stride))
        if not met:  # nothing but padding
            index[-1] = slice(0, 0)
    whole = [slice(0, axis.input_size, 1) for axis in geometry.axes]
    return None if index[1:] == whole else tuple(index)
