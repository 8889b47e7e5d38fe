"""The input-based factors ``A`` of linear layers and convolutions."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.algorithms.pointwise import add_columns_
from einconv_kfac.curvature.factors.choice import algorithm_of
from einconv_kfac.curvature.factors.indices.residue_classes import ResidueClass, residue_classes
from einconv_kfac.curvature.factors.problem import Problem, check_approximation
from einconv_kfac.curvature.factors.reduce import position_sums, reduced_factor, window_sums
from einconv_kfac.curvature.factors.symmetric.update import (
    Update,
    accumulation_dtype,
    blocks_of,
    prepare,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, conv_geometry, conv_transpose_geometry
from einconv_kfac.padding import pad_input


@torch.no_grad()
def conv_input_factor(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    approximation: str = "expand",
    bias: bool = False,
    *,
    algorithm: str | None = None,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a convolution, in any dimension.

    With ``a[n, s]`` the columns of the unfolded input of a group, and a last entry 1 if there
    is a bias, ``A = 1/N sum_n sum_s a a^T`` (expand) or ``A = 1/N sum_n abar abar^T`` with
    ``abar = 1/S sum_s a`` (reduce). The result is symmetric to the last bit.

    Args:
        x: Input of shape ``[N, C, *i]``. A padding mode other than zeros enters through an
            input that is already padded.
        kernel_size: As in torch, like the hyper-parameters that follow.
        stride: As in torch.
        padding: As in torch, or ``(left, right)`` for each dimension.
        dilation: As in torch.
        groups: As in torch.
        approximation: ``"expand"`` (KFC) or ``"reduce"``.
        bias: Whether the layer has a bias; its row and column are the last.
        algorithm: Name of the algorithm to use for expand; by default the cheapest.
        out: Symmetric tensor to update and return: ``out <- beta * out + alpha * A``.
        beta: What the old values of ``out`` are multiplied with.
        alpha: What the factor is multiplied with.

    Returns:
        Factors of shape ``[groups, D, D]`` with ``D = C / groups * K (+ 1)`` and rows in the
        order of ``weight.flatten(1)``; of the input's dtype, float32 if that is smaller.

    Raises:
        ValueError: If a hyper-parameter, the approximation, the algorithm or ``out`` does not
            fit, or if the batch is empty.

    >>> x = torch.ones(2, 1, 3)
    >>> conv_input_factor(x, kernel_size=2, padding=(1,), bias=True)
    tensor([[[3., 2., 3.],
             [2., 3., 3.],
             [3., 3., 4.]]])
    """
    geometry = conv_geometry(x.shape[2:], kernel_size, stride, padding, dilation, groups)
    expand = check_approximation(approximation, algorithm)
    problem, dtype, alpha = _problem(x, geometry), accumulation_dtype(x.dtype), alpha / x.shape[0]
    if not expand:
        sums, positions = window_sums(x, geometry, dtype), geometry.positions
        target: Any = {"out": out, "beta": beta, "alpha": alpha}
        return reduced_factor(sums, positions, groups, bias=bias, **target)
    update = prepare(x, (groups, problem.size + bias), out, beta, alpha)
    algorithm_of(problem, algorithm).add(x, problem, update.within(problem.size))
    if bias:
        _append_ones_(window_sums(x, geometry, dtype), geometry.positions, update)
    return update.out


@torch.no_grad()
def conv_transpose_input_factor(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    approximation: str = "expand",
    bias: bool = False,
    *,
    algorithm: str | None = None,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a transposed convolution.

    As `conv_input_factor`; the positions ``s`` that are summed over are those of the
    transposed convolution's output.

    Args:
        x: Input of shape ``[N, C, *o]``.
        kernel_size: As in torch, like the hyper-parameters that follow.
        stride: As in torch.
        padding: As in torch, or ``(left, right)`` for each dimension.
        output_padding: As in torch.
        dilation: As in torch.
        groups: As in torch.
        approximation: See `conv_input_factor`, as for the arguments that follow.
        bias: See `conv_input_factor`.
        algorithm: See `conv_input_factor`.
        out: See `conv_input_factor`.
        beta: See `conv_input_factor`.
        alpha: See `conv_input_factor`.

    Returns:
        Factors of shape ``[groups, D, D]`` with ``D = C / groups * K (+ 1)``, rows ordered
        ``(ci, *k)``.

    Raises:
        ValueError: As `conv_input_factor`.

    >>> conv_transpose_input_factor(torch.ones(2, 1, 3), kernel_size=2, stride=2)
    tensor([[[3., 0.],
             [0., 3.]]])
    """
    geometry = conv_transpose_geometry(
        x.shape[2:], kernel_size, stride, padding, output_padding, dilation, groups
    )
    expand = check_approximation(approximation, algorithm)
    problem, dtype, alpha = _problem(x, geometry), accumulation_dtype(x.dtype), alpha / x.shape[0]
    x, positions = _pad_to(x, geometry.output_size), prod(geometry.input_size)
    if bias or not expand:
        sums = window_sums(x, geometry, dtype, transposed=True)
    if not expand:
        target: Any = {"out": out, "beta": beta, "alpha": alpha}
        return reduced_factor(sums, positions, groups, bias=bias, **target)
    update = prepare(x, (groups, problem.size + bias), out, beta, alpha)
    _add_classes_(x, problem, update.within(problem.size), algorithm)
    if bias:
        _append_ones_(sums, positions, update)
    return update.out


@torch.no_grad()
def linear_input_factor(
    a: Tensor,
    approximation: str = "expand",
    bias: bool = False,
    *,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a linear layer.

    Args:
        a: Input of shape ``[N, *s, D]``; ``s`` are the weight-sharing positions, if any.
        approximation: See `conv_input_factor`, as for the arguments that follow.
        bias: See `conv_input_factor`.
        out: See `conv_input_factor`.
        beta: See `conv_input_factor`.
        alpha: See `conv_input_factor`.

    Returns:
        Factor of shape ``[1, D (+ 1), D (+ 1)]``.

    Raises:
        ValueError: If the approximation or ``out`` does not fit, or if the batch is empty.

    >>> linear_input_factor(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    tensor([[[5., 1.],
             [1., 2.]]])
    """
    expand = check_approximation(approximation)
    _check_batch(a, 2)
    n, positions, size = a.shape[0], prod(a.shape[1:-1]), a.shape[-1]
    rows, dtype, alpha = a.reshape(n, positions, size), accumulation_dtype(a.dtype), alpha / n
    if bias or not expand:
        sums = position_sums(rows.mT, dtype)
    if not expand:
        target: Any = {"out": out, "beta": beta, "alpha": alpha}
        return reduced_factor(sums, positions, 1, bias=bias, **target)
    update = prepare(a, (1, size + bias), out, beta, alpha)
    add_columns_(rows.mT.unsqueeze(1), update.within(size))
    if bias:
        _append_ones_(sums, positions, update)
    return update.out


def _problem(x: Tensor, geometry: Geometry) -> Problem:
    """Return the problem of the input ``x`` of shape ``[n, c, *i]``.

    Raises:
        ValueError: If the batch is empty or the channels do not split into groups.
    """
    _check_batch(x, 3)
    channels = geometry.split_channels(x.shape[1])
    return Problem(geometry, x.shape[0], channels, x.dtype, x.device.type)


def _pad_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Append zeros for outputs that a large ``output_padding`` adds to the convolution."""
    return pad_input(x, [(0, wanted - have) for wanted, have in zip(size, x.shape[2:])])


def _check_batch(x: Tensor, ndim: int) -> None:
    """Check that ``x`` has examples and at least ``ndim`` dimensions."""
    if x.ndim < ndim or x.shape[0] == 0:
        raise ValueError(
            f"The input must be a non-empty batch with at least {ndim} dimensions, got shape "
            f"{tuple(x.shape)}."
        )


def _add_classes_(x: Tensor, problem: Problem, update: Update, algorithm: str | None) -> None:
    """Add the products of a transposed convolution, one residue class after the other."""
    geometry = problem.geometry
    kernel = geometry.kernel_size
    blocks = blocks_of(update.out, kernel)
    blocks.mul_(update.beta) if update.beta else blocks.zero_()
    for classes in product(*map(residue_classes, geometry.axes)):
        ordinary = Geometry(tuple(entry.axis for entry in classes), geometry.groups)
        kept: tuple[Any, ...] = (..., *(entry.kept for entry in classes))
        part = x[kept]
        inner = _problem(part, ordinary)
        fresh = prepare(part, (geometry.groups, inner.size), None, 0.0, update.alpha)
        algorithm_of(inner, algorithm).add(part, inner, fresh)
        _class_blocks(blocks, classes).add_(_reversed_blocks(fresh.out, ordinary.kernel_size))


def _class_blocks(blocks: Tensor, classes: tuple[ResidueClass, ...]) -> Tensor:
    """View the entries of one class in ``blocks``, of shape ``[g, ci, *k, ci', *k']``."""
    entries = [sorted(found.entries) for found in classes]
    slices = [slice(e[0], e[-1] + 1, e[1] - e[0] if len(e) > 1 else 1) for e in entries]
    return blocks[(slice(None), slice(None), *slices, slice(None), *slices)]


def _reversed_blocks(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return ``[g, (ci *k), (ci' *k')]`` as ``[g, ci, *k, ci', *k']``, each kernel reversed."""
    d = len(kernel)
    return blocks_of(factor, kernel).flip([*range(2, 2 + d), *range(3 + d, 3 + 2 * d)])


def _append_ones_(sums: Tensor, positions: int, update: Update) -> None:
    """Update the row and column of a constant 1 from sums over positions.

    Args:
        sums: The sums of ``a`` over positions, ``[n, (g d)]``.
        positions: Number of positions.
        update: The update, of all rows and columns.
    """
    groups, size = update.out.shape[0], update.out.shape[1] - 1
    column = sums.sum(0).view(groups, size)
    update.set_(column, update.out[:, :size, size])
    update.out[:, size, :size] = update.out[:, :size, size]
    corner = column.new_full((groups,), positions * sums.shape[0])
    update.set_(corner, update.out[:, size, size])
