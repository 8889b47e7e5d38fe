"""Products of each row with itself and the rows that follow, in one batch: for small inputs.

A row is the last dimension, cut into blocks of outputs as in `bands`. The product of row ``r``
with the rows ``r + d D`` holds all that the entries ``(k, k + d)`` sum of it. Which rows an entry
sums depends on ``k`` alone, since rows beyond the input are zero: a product with a 0/1 matrix
``[k, r]``. So a few dozen calls suffice, without a loop over regions and lags.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.algorithms.output_blocks import Band
from einconv_kfac.curvature.factors.indices.runs import met_entries
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.scatter import store
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis

LEAST_PRODUCT_ELEMENTS = 1 << 16
"""Elements of products that are computed at a time at least; so many fit a cache."""

EXAMPLE_MAC_PRICE = 1.3
"""Price of a multiplication in sums over examples."""

REGISTER_COLUMNS = 8
"""Columns that a product computes together, even if there are fewer."""

BLOCK_CALL_MACS = 3.5e5
"""Price of one more block's calls, in multiplications."""

BAND_CALL_MACS = 3.5e6
"""Price of the calls for one more width of blocks, in multiplications."""


def _axes(problem: Problem) -> tuple[Axis, Axis]:
    """Return the dimension of the rows and that along them."""
    *lead, last = problem.geometry.axes
    return (lead[0] if lead else Axis(1, 1)), last


@lru_cache(maxsize=1024)
def row_bands(problem: Problem) -> tuple[Band, ...]:
    """Return the blocks that cover the last dimension's outputs: equal ones, and one for the rest.

    Blocks are few if calls cost most, and narrow if products do.
    """
    lead, axis = _axes(problem)
    size, found = axis.output_size, []
    pairs = _length(lead) * lead.dilation * _distances(lead) * (problem.batch + lead.kernel_size)
    for each in _widths(size):
        bands = [Band(axis, 0, each, (each - 1) * axis.stride + axis.span, size // each)]
        rest = size % each
        if rest:
            bands.append(Band(axis, size - rest, rest, (rest - 1) * axis.stride + axis.span, 1))
        products = pairs * sum(band.count * _square(band.width, problem.channels) for band in bands)
        price = (
            products
            + BLOCK_CALL_MACS * sum(band.count for band in bands)
            + BAND_CALL_MACS * len(bands)
        )
        found.append((price, tuple(bands)))
    return min(found, key=lambda pair: pair[0])[1]


def _widths(size: int) -> Iterator[int]:
    """Yield the outputs of the largest of equal blocks, once each, from one block on."""
    each = size
    while each > 1:
        yield each
        count = -(-size // (each - 1))  # the fewest blocks that are smaller
        each = -(-size // count)
    yield 1


def _square(width: int, channels: int) -> int:
    """Return the pairs of positions of a block, one side filled up to whole registers."""
    size = width * channels
    return size * -(-size // REGISTER_COLUMNS) * REGISTER_COLUMNS


def _distances(lead: Axis) -> int:
    """Return the number of distances between rows that have products."""
    return min(lead.kernel_size - 1, (lead.input_size - 1) // lead.dilation) + 1


def _length(lead: Axis) -> int:
    """Return the rows of one remainder modulo the dilation, with the zeros that follow."""
    return -(-lead.input_size // lead.dilation) + _distances(lead) - 1


@lru_cache(maxsize=256)
def _windows(lead: Axis) -> tuple[tuple[float, ...], ...]:
    """Return the matrix ``[k, row]`` that is 1 where an entry meets a row."""
    met = (*met_entries(lead, False), *[()] * (_length(lead) * lead.dilation))
    grids = (range(grid, len(met), lead.dilation) for grid in range(lead.dilation))
    order = [met[row] for rows in grids for row in rows[: _length(lead)]]
    return tuple(tuple(float(k in found) for found in order) for k in range(lead.kernel_size))


def _row_sums(x: Tensor, problem: Problem, band: Band, alpha: float) -> Tensor:
    """Return the products of rows, summed over those that each entry meets, ``[k, (i d i')]``.

    Positions ``i`` are those of all channels, and ``d`` is the distance of the rows.
    """
    lead, width = _axes(problem)[0], problem.channels * band.width
    windows, size = x.new_tensor(_windows(lead)), _distances(lead) * width**2
    sums, beta = x.new_empty(len(windows), size), 0.0
    step = max(1, max(LEAST_PRODUCT_ELEMENTS, problem.inputs // 2) // size)
    products = x.new_empty(min(step, windows.shape[1]), width, size // width)
    for block in range(band.count):
        left, right = _operands(x, lead, band, block)
        for start in range(0, len(left), step):
            rows = slice(start, start + step)
            part = products[: len(left) - start]
            torch.bmm(left[rows], right[rows], out=part)
            sums.addmm_(windows[:, rows], part.flatten(1), beta=beta, alpha=alpha)
            beta = 1.0
        del left, right  # freed before the next ones are computed
    return sums


def _operands(x: Tensor, lead: Axis, band: Band, block: int) -> tuple[Tensor, Tensor]:
    """Return a block of each row, ``[r, (c w), n]``, and of those from it on, ``[r, n, (d c w)]``.

    Both view one copy of ``x``, ``[c, t, i, n]``, in which the rows of a product are adjacent.
    """
    c, _, size, n = x.shape
    shape = (lead.dilation, _length(lead), c, band.width, n)
    rows, pitch, distances = prod(shape[:2]), prod(shape[2:]), _distances(lead)
    flat = x.new_zeros((rows + distances - 1) * pitch)
    start = band.start(block)
    low, high = max(0, start), min(size, start + band.width)
    for grid, target in enumerate(flat[: rows * pitch].view(shape)):
        part = x[:, grid :: lead.dilation, low : max(low, high)].movedim(0, 1)  # t c w n
        target[: len(part), :, low - start : low - start + part.shape[2]] = part
    left = flat.as_strided((rows, pitch // n, n), (pitch, n, 1))
    return left, flat.as_strided((rows, n, distances * pitch // n), (pitch, 1, n))


def _entries(sums: Tensor, problem: Problem, band: Band) -> Tensor:
    """Sum ``[k0, (c i d c' i')]`` over the outputs of a block, to ``[k0, d, c, k, c', k']``."""
    axis, c, w = band.axis, problem.channels, band.width
    row = sums.shape[1] // (c * w)
    k, d = axis.kernel_size, row // (c * w)
    sizes = (len(sums), d, c, k, c, k, band.outputs)
    strides = (
        *(sums.shape[1], c * w),
        *(w * row, axis.dilation * row),
        *(w, axis.dilation),
        axis.stride * (row + 1),
    )
    return sums.as_strided(sizes, strides).sum(-1)


def _triangle(entries: Tensor) -> Tensor:
    """Return ``[k0, d, c, k, c', k']`` in order, ``[(c k0 k), (c' k0' k')]``, half of the sum.

    Entries left of the diagonal are zero, and those on it are halved. The sum of the matrix and
    its transpose is complete.
    """
    k0, distances, c, k = entries.shape[:4]
    entries[:, 0] *= 0.5
    wide = entries.new_zeros(c, k0, k, c, k0 + distances - 1, k)
    s = wide.stride()
    strides = (s[1] + s[4], s[4], s[0], s[2], s[3], s[5])  # k0' = k0 + d
    wide.as_strided(entries.shape, strides).copy_(entries)
    return wide[..., :k0, :].reshape(c * k0 * k, -1)


class Rows(Algorithm):
    """Products of rows with the rows that follow, in one batch."""

    name = "rows"
    rank = 3
    reads_unmet = True

    def applies(self, problem: Problem) -> bool:
        """Return whether the input is a line or an image, in one group, and products are cached."""
        geometry = problem.geometry
        return problem.profile.is_cached and geometry.ndim <= 2 and geometry.groups == 1

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        (lead, last), c = _axes(problem), problem.channels
        found = row_bands(problem)
        distances, rows = _distances(lead), _length(lead) * lead.dilation
        products = sum(rows * band.count * distances * (c * band.width) ** 2 for band in found)
        macs = (
            products
            * (EXAMPLE_MAC_PRICE * problem.batch + lead.kernel_size)
            * problem.matmul_price()
        )
        width = c * max(band.width for band in found)
        blocks = sum(band.count for band in found) * lead.dilation
        copied = problem.inputs * blocks * max(b.width for b in found) / last.input_size
        sums = lead.kernel_size * distances * (c * last.kernel_size) ** 2
        written = products / 6 + sum(sums * band.outputs for band in found) + 2 * problem.outputs
        parts = sum(rows * b.count * distances * (c * b.width) ** 2 for b in found)
        parts = parts // max(LEAST_PRODUCT_ELEMENTS, problem.inputs // 2)
        calls = 25 + 12 * len(found) + 5 * blocks + 6 * parts
        return Cost(macs, width, copied, written, calls)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, from products of rows."""
        lead, last = _axes(problem)
        n, c = x.shape[:2]
        x = x.reshape(n, -1).T.to(update.out.dtype, memory_format=torch.contiguous_format)
        x = x.contiguous().view(c, lead.input_size, last.input_size, n)
        found = [
            _entries(_row_sums(x, problem, band, update.alpha), problem, band)
            for band in row_bands(problem)
        ]
        halves = _triangle(reduce(torch.add, found))
        store(update.out[0], halves + halves.T, update.beta)
