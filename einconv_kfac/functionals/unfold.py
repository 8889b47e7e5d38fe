"""Unfold (im2col), its adjoint fold (col2im), and transposed unfold, in any dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.evaluate.kernels import windows
from einconv_kfac.evaluate.recording import is_traced_for_onnx
from einconv_kfac.expressions import conv_transposeNd_unfold, convNd_fold, convNd_unfold
from einconv_kfac.expressions.shapes import check_tensor, column_channels, spatial_size
from einconv_kfac.functionals.tracing import refuse_trace
from einconv_kfac.geometry import (
    Padding,
    Sizes,
    conv_transpose_geometry,
    parse_geometry,
)
from einconv_kfac.geometry.spellings import as_flag, as_sizes


def unfoldNd(  # noqa: N802 (einconv's name)
    x: Tensor, kernel_size: Sizes,
    dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, simplify: bool = True,
) -> Tensor:  # fmt: skip
    """Unfold the input of a convolution (im2col), like ``torch.nn.functional.unfold``.

    ``u[n,(c k),(o)] = x[n,c,i] P[k,o,i]``, in any dimension.

    Args:
        x: Input of shape ``[n, c, *i]``.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Input positions between kernel entries.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        stride: Input positions between windows.
        simplify: Whether to unfold by views; otherwise the network is contracted as given.

    Returns:
        Tensor of shape ``[n, (c *k), (*o)]``.

    Raises:
        ValueError: As `conv_geometry`.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> unfoldNd(torch.rand(2, 3, 8), kernel_size=3).shape
    torch.Size([2, 9, 6])
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        refuse_trace("unfoldNd")
    check_tensor(x, "x")
    sizes = spatial_size(tuple(x.shape), "x")
    geometry = parse_geometry(sizes, kernel_size, stride, padding, dilation)
    if as_flag(simplify, "simplify") or torch.compiler.is_dynamo_compiling():
        return windows.unfold(geometry, x)
    return _own(evaluate(convNd_unfold.network(geometry, x.shape[0], x.shape[1]), x))


def foldNd(  # noqa: N802 (in line with unfoldNd)
    x: Tensor, output_size: Sizes, kernel_size: Sizes,
    dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, simplify: bool = True,
) -> Tensor:  # fmt: skip
    """Sum columns into an image (col2im), like ``torch.nn.functional.fold``.

    ``y[n,c,i] = x[n,(c k),(o)] P[k,o,i]``, in any dimension: the adjoint of `unfoldNd`.

    Args:
        x: Columns of shape ``[n, (c *k), (*o)]``, or ``[(c *k), (*o)]``.
        output_size: Number of image positions ``i``, one per dimension; a number is one
            dimension.
        kernel_size: As in `unfoldNd`.
        dilation: As in `unfoldNd`.
        padding: As in `unfoldNd`.
        stride: As in `unfoldNd`.
        simplify: As in `unfoldNd`.

    Returns:
        Tensor of shape ``[n, c, *i]``, or ``[c, *i]``.

    Raises:
        ValueError: If the columns do not match the sizes, or as `conv_geometry`.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> foldNd(torch.rand(2, 6, 7), (8,), kernel_size=2).shape
    torch.Size([2, 3, 8])
    """
    if is_traced_for_onnx():
        raise ValueError(
            "foldNd cannot be recorded by `torch.onnx.export` with `dynamo=False`, which leaves "
            "out changes of views. Leave out `dynamo=False`."
        )
    check_tensor(x, "x")
    sizes = as_sizes(output_size, "output_size")
    geometry = parse_geometry(sizes, kernel_size, stride, padding, dilation)
    columns = x.unsqueeze(0) if x.ndim == 2 else x
    channels = column_channels(tuple(columns.shape), geometry, "x")
    if as_flag(simplify, "simplify") or torch.compiler.is_dynamo_compiling():
        folded = windows.fold(geometry, columns)
    else:
        folded = _own(evaluate(convNd_fold.network(geometry, columns.shape[0], channels), columns))
    return folded.squeeze(0) if x.ndim == 2 else folded


def unfoldNd_transpose(  # noqa: N802 (in line with unfoldNd)
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0, dilation: Sizes = 1,
    simplify: bool = True,
) -> Tensor:  # fmt: skip
    """Unfold the input of a transposed convolution.

    ``u[n,(c k),(i)] = x[n,c,o] P[k,o,i]``, in any dimension. With ``W`` the kernel of a group as a
    matrix ``[ci, (co k)]``, the transposed convolution is ``W u``.

    Args:
        x: Input of shape ``[n, c, *o]``.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Result positions between the windows of adjacent inputs.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        dilation: Result positions between kernel entries.
        simplify: As in `unfoldNd`.

    Returns:
        Tensor of shape ``[n, (c *k), (*i)]``.

    Raises:
        ValueError: As `conv_transpose_geometry`.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> unfoldNd_transpose(torch.rand(2, 3, 7), kernel_size=2, stride=2).shape
    torch.Size([2, 6, 14])
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        refuse_trace("unfoldNd_transpose")
    check_tensor(x, "x")
    sizes = spatial_size(tuple(x.shape), "x")
    options = (kernel_size, stride, padding, output_padding, dilation)
    geometry = conv_transpose_geometry(sizes, *options)
    if as_flag(simplify, "simplify") or torch.compiler.is_dynamo_compiling():
        return windows.unfold_transposed(geometry, x)
    return _own(evaluate(conv_transposeNd_unfold.network(geometry, x.shape[0], x.shape[1]), x))


def _own(result: Tensor) -> Tensor:
    """Return a copy, since a network's value may be a view of the caller's tensor."""
    return result.clone(memory_format=torch.contiguous_format)
