"""Kernels in Triton for `Fused`; they are functions of Python where Triton is not installed.

A program of the first kernel multiplies one tile of the upper block triangle over a part of the
positions. It reads the columns of the unfolded input from the input itself. The parts are summed by
the second kernel, always in the same order, which writes each entry above the diagonal twice. So
the result is symmetric to the last bit, and the same in each run.

Geometries have three axes; missing ones are of size 1. Triton reads annotations as code, so that
only its own can be there.
"""

# mypy: disable-error-code="no-untyped-def, name-defined"

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def _found(name: str) -> Any:
    """Import a module, or return ``None`` where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton = _found("triton")
tl = _found("triton.language")


def _jit(kernel: Callable[..., Any]) -> Any:
    """Compile a kernel on its first call."""
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _tile(t):
    """Return row and column of a tile, ``i <= j``, from its number ``t = j (j + 1) / 2 + i``."""
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j


# fmt: off
@_jit
def _columns(
    x, row, site, is_site, C, I0, I1, I2, O1, O2,
    positions, xn, xc, x0, x1, x2, first,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):
    """Return rows of the unfolded input at some positions, ``[row, site]``."""
    c, k = row // (K0 * K1 * K2), row % (K0 * K1 * K2)
    n, o = site // positions, site % positions
    i0 = (o // (O1 * O2) * S0)[None, :] + (k // (K1 * K2) * D0 - P0)[:, None]
    i1 = (o // O2 % O1 * S1)[None, :] + (k // K2 % K1 * D1 - P1)[:, None]
    i2 = (o % O2 * S2)[None, :] + (k % K2 * D2 - P2)[:, None]
    inside = (c < C)[:, None] & is_site[None, :] & (i0 >= 0) & (i0 < I0)
    inside = inside & (i1 >= 0) & (i1 < I1) & (i2 >= 0) & (i2 < I2)
    place = (n * xn)[None, :] + ((first + c) * xc)[:, None] + i0 * x0 + i1 * x1 + i2 * x2
    return tl.load(x + place, mask=inside, other=0.0)


@_jit
def partial_products(
    x, sums, sites, per_part, C, I0, I1, I2,
    O1, O2, positions, xn, xc, x0, x1, x2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, SITES: tl.constexpr, PRECISION: tl.constexpr,
):
    """Write the product of one tile, part of the positions, and group: ``[part, g, t, i, j]``."""
    t, part, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = _tile(t)
    rows, columns = i * ROWS + tl.arange(0, ROWS), j * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ROWS), tl.float32)
    start = part * per_part
    stop = tl.minimum(start + per_part, sites)
    for begin in range(start, stop, SITES):
        site = begin + tl.arange(0, SITES)
        a = _columns(x, rows, site, site < stop, C, I0, I1, I2, O1, O2, positions, xn, xc, x0, x1,
                     x2, g * C, K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2)
        b = _columns(x, columns, site, site < stop, C, I0, I1, I2, O1, O2, positions, xn, xc, x0,
                     x1, x2, g * C, K0, K1, K2, S0, S1, S2, P0, P1, P2, D0, D1, D2)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    slot = (part * tl.num_programs(2) + g).to(tl.int64) * tl.num_programs(0) + t
    inner = tl.arange(0, ROWS)
    tl.store(sums + slot * ROWS * ROWS + inner[:, None] * ROWS + inner[None, :], total)


@_jit
def add_parts(
    sums, out, size, parts, og, oi, oj, beta, alpha,
    ROWS: tl.constexpr, HAS_BETA: tl.constexpr,
):
    """Set a tile and its mirror image to ``beta out + alpha sum_part sums``."""
    t, g = tl.program_id(0), tl.program_id(1)
    i, j = _tile(t)
    inner = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for part in range(0, parts):
        slot = (part * tl.num_programs(1) + g).to(tl.int64) * tl.num_programs(0) + t
        total += tl.load(sums + slot * ROWS * ROWS + inner[:, None] * ROWS + inner[None, :])
    rows, columns = (i * ROWS + inner)[:, None], (j * ROWS + inner)[None, :]
    upper = (rows <= columns) & (columns < size)
    matrix = out + g.to(tl.int64) * og
    value = total * alpha
    if HAS_BETA:
        value += beta * tl.load(matrix + rows * oi + columns * oj, mask=upper, other=0.0)
    tl.store(matrix + rows * oi + columns * oj, value, mask=upper)
    tl.store(matrix + columns * oi + rows * oj, value, mask=upper)
# fmt: on
