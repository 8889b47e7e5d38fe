"""Products of all pairs of positions, then sums over the pairs of each entry: for tiny images.

``A[(c,k),(c',k')] = sum_{i,i'} G[(c,i),(c',i')] prod_j Q_j[(i_j,i_j'),(k_j,k_j')]`` with the Gram
matrix ``G`` of the input's positions, and the number ``Q_j`` of outputs along dimension ``j`` for
which ``k_j`` meets ``i_j`` while ``k_j'`` meets ``i_j'``. Along the first dimension ``i <= i'``
contribute to ``k <= k'`` alone, and half of the pairs suffice. There are no regions, and only
products of matrices; but the work grows with the square of the number of positions.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.algorithms.algorithm import (
    BATCHED_MATRIX_CALLS,
    Algorithm,
    Cost,
)
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.gather import write_gathered
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis

LARGEST_GRAM_ROWS = 512
"""Channels times positions of a group up to which the algorithm applies."""

CACHED_GRAM_ELEMENTS = 1 << 17
"""Elements of Gram matrices that are computed at a time, so that they stay in a cache."""


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


def _upper(pattern: Tensor, axis: Axis) -> Tensor:
    """Keep the pairs ``i <= i'`` and ``k <= k'`` of ``[(i i'), (k k')]``, and transpose it."""
    kept = [
        above[0] * size + above[1]
        for size in (axis.input_size, axis.kernel_size)
        for above in [torch.triu_indices(size, size, device=pattern.device)]
    ]
    return pattern.index_select(0, kept[0]).index_select(1, kept[1]).T.contiguous()


def _upper_indices(problem: Problem, device: torch.device) -> Tensor:
    """Return the flat indices of ``[c, c', i0 <= i0', (i1 i1'), ..]`` in a Gram matrix."""
    sizes, c, d = problem.geometry.input_size, problem.channels, problem.geometry.ndim
    indices = torch.arange((c * prod(sizes)) ** 2, device=device).view(c, *sizes, c, *sizes)
    mixed = [dim for j in range(1, d) for dim in (1 + j, 2 + d + j)]
    indices = indices.permute(0, 1 + d, 1, 2 + d, *mixed).flatten(2, 3)  # c c' (i0 i0') i1 i1' ..
    above = torch.triu_indices(sizes[0], sizes[0], device=device)
    return indices.index_select(2, above[0] * sizes[0] + above[1]).flatten()


def _entries(products: Tensor, problem: Problem, first: Tensor, others: list[Tensor]) -> Tensor:
    """Sum products ``[g, (c c' (i0 <= i0') i1 i1' ..)]`` to entries ``[g, kk', (c l c' l')]``.

    ``kk'`` are the pairs ``k0 <= k0'``, and ``l`` the kernel entries of the other dimensions.
    """
    c, d = problem.channels, problem.geometry.ndim
    sizes, kernel = problem.geometry.input_size[1:], problem.geometry.kernel_size[1:]
    found = products.view(-1, first.shape[1], *(size**2 for size in sizes))  # (g c c') ii' ..
    for pattern in reversed(others):
        found = (found @ pattern).movedim(-1, 2)
    found = found.reshape(*found.shape[:2], -1)  # (g c c') ii' (k1 k1' ..)
    found = torch.bmm(first.expand(len(found), -1, -1), found)
    found = found.view(-1, c, c, len(first), *(k for size in kernel for k in (size, size)))
    left, right = range(4, 2 + 2 * d, 2), range(5, 2 + 2 * d, 2)
    return found.permute(0, 3, 1, *left, 2, *right).reshape(len(products), len(first), -1)


def _groups_at_a_time(problem: Problem) -> int:
    """Return the groups whose Gram matrices are computed together."""
    rows, profile = problem.channels * prod(problem.geometry.input_size), problem.profile
    limit = CACHED_GRAM_ELEMENTS if profile.is_cached else profile.largest_chunk_elements
    return max(1, limit // rows**2)


def _pairs(size: int) -> int:
    """Return the number of pairs ``i <= i'``."""
    return size * (size + 1) // 2


class Grams(Algorithm):
    """Products of all pairs of positions, for tiny images."""

    name = "grams"
    rank = 4
    reads_unmet = True

    def applies(self, problem: Problem) -> bool:
        """Return whether the image is tiny: memory grows with the square of the positions."""
        rows = problem.channels * prod(problem.geometry.input_size)
        return rows <= LARGEST_GRAM_ROWS

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        axes, groups = problem.geometry.axes, problem.geometry.groups
        rows = problem.channels * prod(problem.geometry.input_size)
        macs = float(rows**2 * problem.batch)
        left = rows**2 * _pairs(axes[0].input_size) / axes[0].input_size ** 2
        for axis in reversed(axes[1:]):
            macs += left * axis.kernel_size**2
            left *= (axis.kernel_size / axis.input_size) ** 2
        macs += left * _pairs(axes[0].kernel_size)
        calls = (
            60 + 12 * -(-groups // _groups_at_a_time(problem)) + 8 * BATCHED_MATRIX_CALLS * groups
        )
        price = 1.5 * problem.matmul_price()
        written = 0.8 * groups * rows**2 + 0.5 * problem.outputs  # mostly gathered, in order
        return Cost(macs * groups * price, 1.0, problem.inputs, written, calls)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from the Gram matrix of the positions."""
        geometry, dtype = problem.geometry, update.out.dtype
        x = x.reshape(x.shape[0], geometry.groups, -1).permute(1, 2, 0)  # g (c i) n
        first, *others = (pair_pattern(axis, x, dtype) for axis in geometry.axes)
        first = _upper(first, geometry.axes[0]) * update.alpha
        indices = _upper_indices(problem, x.device)
        step = _groups_at_a_time(problem)
        for start in range(0, geometry.groups, step):
            part = x[start : start + step].to(dtype)
            products = torch.bmm(part, part.mT).flatten(1).index_select(1, indices)
            found = _entries(products, problem, first, others)
            rest = problem.entries // geometry.kernel_size[0]
            some = replace(update, out=update.out[start : start + step])
            write_gathered(found, geometry.kernel_size[0], rest, some)
