"""The input-based factors ``A`` of linear layers and convolutions."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import flag
from einconv_kfac.curvature.factors.approximation import WeightSharing, weight_sharing
from einconv_kfac.curvature.factors.columns import Columns, FeatureColumns
from einconv_kfac.curvature.factors.conv_columns import ConvColumns
from einconv_kfac.curvature.factors.factor_arguments import batch_of, checked_target
from einconv_kfac.curvature.factors.precision import Precision, rounded
from einconv_kfac.curvature.factors.symmetric.update import Target
from einconv_kfac.curvature.factors.transposed_conv_columns import TransposedConvColumns
from einconv_kfac.geometry import Padding, Sizes, conv_geometry, conv_transpose_geometry


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
    precision: Precision = "full",
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a convolution, in any dimension.

    ``a[n, s]`` are the columns of a group's unfolded input; with a bias, a 1 is appended. Then
    ``A = 1/N sum_n sum_s a a^T`` (expand; KFC, Grosse and Martens, 2016), or
    ``A = 1/N sum_n abar abar^T`` with ``abar = 1/S sum_s a`` (reduce; Eschenhagen et al., 2023).
    The result is symmetric to the last bit.

    Args:
        x: Input of shape ``[N, C, *i]``. For a padding mode other than zeros it must already
            be padded.
        kernel_size: As in torch, like the hyper-parameters that follow.
        stride: As in torch.
        padding: As in torch, or ``(left, right)`` for each dimension.
        dilation: As in torch.
        groups: As in torch.
        approximation: ``"expand"`` or ``"reduce"``.
        bias: Whether the layer has a bias; its row and column are the last.
        algorithm: Name of the algorithm for ``"expand"``; by default the cheapest.
        precision: ``"full"``, or ``"bfloat16"`` to round the input to 8 bits, a relative error of
            at most 2^-9. Products of rounded numbers are exact and added in float32, so that the
            factor is that of the rounded input: symmetric and positive semi-definite. Products
            in TF32 follow ``torch.backends.cuda.matmul.allow_tf32``, which is off by default.
        out: Symmetric tensor to update and return: ``out <- beta * out + alpha * A``.
        beta: Multiplier of the old values of ``out``.
        alpha: Multiplier of the factor.

    Returns:
        Factors of shape ``[groups, D, D]`` with ``D = C / groups * K (+ 1)`` and rows in the
        order of ``weight.flatten(1)``; of the input's dtype, float32 if that is smaller.

    Raises:
        ValueError: If a hyper-parameter, the approximation, the algorithm, the precision or
            ``out`` is invalid, or if the batch is empty.

    >>> x = torch.ones(2, 1, 3)
    >>> conv_input_factor(x, kernel_size=2, padding=(1,), bias=True)
    tensor([[[3., 2., 3.],
             [2., 3., 3.],
             [3., 3., 4.]]])
    """
    x = rounded(batch_of(x, 3, "x"), precision)
    geometry = conv_geometry(x.shape[2:], kernel_size, stride, padding, dilation, groups)
    sharing = weight_sharing(approximation, algorithm)
    columns = ConvColumns(x, geometry, algorithm)
    return _factor(sharing, columns, checked_target(out, beta, alpha), flag("bias", bias))


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
    precision: Precision = "full",
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a transposed convolution.

    It is defined as in `conv_input_factor`, with the positions ``s`` of the transposed
    convolution's output.

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
        precision: See `conv_input_factor`.
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
    size = batch_of(x, 3, "x").shape[2:]
    hyper = kernel_size, stride, padding, output_padding, dilation, groups
    geometry = conv_transpose_geometry(size, *hyper)
    sharing = weight_sharing(approximation, algorithm)
    columns = TransposedConvColumns(rounded(x, precision), geometry, algorithm)
    return _factor(sharing, columns, checked_target(out, beta, alpha), flag("bias", bias))


@torch.no_grad()
def linear_input_factor(
    a: Tensor,
    approximation: str = "expand",
    bias: bool = False,
    *,
    precision: Precision = "full",
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the input-based Kronecker factor of a linear layer.

    It is defined as in `conv_input_factor`, with the inputs as columns ``a[n, s]``.

    Args:
        a: Input of shape ``[N, *s, D]``; ``s`` are the weight-sharing positions, if any.
        approximation: See `conv_input_factor`, as for the arguments that follow.
        bias: See `conv_input_factor`.
        precision: See `conv_input_factor`.
        out: See `conv_input_factor`.
        beta: See `conv_input_factor`.
        alpha: See `conv_input_factor`.

    Returns:
        Factor of shape ``[1, D (+ 1), D (+ 1)]``.

    Raises:
        ValueError: If the approximation, the precision or ``out`` is invalid, or if the batch is
            empty.

    >>> linear_input_factor(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    tensor([[[5., 1.],
             [1., 2.]]])
    """
    sharing = weight_sharing(approximation)
    rows = rounded(batch_of(a, 2, "a"), precision)
    columns = FeatureColumns(rows.reshape(a.shape[0], prod(a.shape[1:-1]), a.shape[-1]))
    return _factor(sharing, columns, checked_target(out, beta, alpha), flag("bias", bias))


def _factor(sharing: WeightSharing, columns: Columns, target: Target, bias: bool) -> Tensor:
    """Return ``A``, a mean over examples; ``reduce`` averages over positions first."""
    target = target.averaged(columns.examples)
    return sharing.factor(columns, target, bias=bias, divisor=columns.positions)
