"""Products of all pairs of positions, then sums over the pairs of each entry: for tiny images.

``A[(c,k),(c',k')] = sum_{i,i'} G[(c,i),(c',i')] prod_j Q_j[(i_j,i_j'),(k_j,k_j')]`` with the Gram
matrix ``G`` of the input's positions, and the number ``Q_j`` of outputs along dimension ``j`` for
which ``k_j`` meets ``i_j`` while ``k_j'`` meets ``i_j'``. There are no regions, and only products
of matrices; but the work grows with the square of the number of positions.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.assembly import store
from einconv_kfac.curvature.factors.problem import BATCHED, SMALL, Cost, Problem, mkl_price
from einconv_kfac.curvature.factors.update import Update, mirror_
from einconv_kfac.geometry import Axis

LARGEST = 512
"""Channels times positions of a group up to which all pairs are worth a thought."""


def gram(x: Tensor, problem: Problem, update: Update) -> None:
    """Add ``sum_{n,o} a a^T`` to the update, from the Gram matrix of the positions."""
    geometry, dtype = problem.geometry, update.out.dtype
    x = x.reshape(x.shape[0], geometry.groups, -1).permute(1, 2, 0)  # g (c i) n
    pairs = [pair_pattern(axis, x, dtype) for axis in geometry.axes]
    step = max(1, SMALL // x.shape[1] ** 2)
    for start in range(0, geometry.groups, step):
        part = x[start : start + step].to(dtype)
        found = _entries(torch.bmm(part, part.mT), problem, pairs).mul_(update.alpha)
        mirror_(found)
        store(update.out[start : start + step], found, update.beta)


def pair_pattern(axis: Axis, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Count the outputs at which ``k, k'`` meet ``i, i'``, as ``[(i i'), (k k')]``."""
    kernel, outputs, inputs = (
        torch.arange(size, device=like.device)
        for size in (axis.kernel_size, axis.output_size, axis.input_size)
    )
    met = outputs[:, None] * axis.stride + kernel * axis.dilation - axis.padding[0]  # o k
    pattern = (met.unsqueeze(-1) == inputs).to(dtype)  # o k i
    pairs = torch.einsum("oki,olj->ijkl", pattern, pattern)
    return pairs.flatten(2).flatten(0, 1)


def _entries(products: Tensor, problem: Problem, pairs: list[Tensor]) -> Tensor:
    """Sum the Gram matrix ``[g, (c *i), (c' *i')]`` to the factor ``[g, (c *k), (c' *k')]``."""
    d, c = len(pairs), problem.channels
    sizes, kernel = problem.geometry.input_size, problem.geometry.kernel_size
    mixed = [dim for j in range(d) for dim in (2 + j, 3 + d + j)]
    found = products.reshape(-1, c, *sizes, c, *sizes).permute(0, 1, 2 + d, *mixed)
    found = found.reshape(-1, *(size**2 for size in sizes))  # (g c c') (i0 i0') (i1 i1') ..
    for pattern in reversed(pairs):
        found = (found @ pattern).movedim(-1, 1)
    found = found.reshape(-1, c, c, *(k for size in kernel for k in (size, size)))
    rows, columns = range(3, 3 + 2 * d, 2), range(4, 4 + 2 * d, 2)
    return found.permute(0, 1, *rows, 2, *columns).reshape(-1, problem.size, problem.size)


def gram_cost(problem: Problem) -> Cost:
    """Return what `gram` does."""
    axes, groups = problem.geometry.axes, problem.geometry.groups
    positions = prod(problem.geometry.input_size)
    entries = groups * (problem.channels * positions) ** 2
    macs, left = entries * problem.batch, entries
    for axis in reversed(axes):
        macs += left * axis.kernel_size**2
        left = left * axis.kernel_size**2 // axis.input_size**2
    calls = 60 + 8 * (1 + BATCHED * groups)
    price = 2 * mkl_price(problem)
    return Cost(macs * price, 1.0, problem.inputs, entries + 2 * problem.outputs, calls)
