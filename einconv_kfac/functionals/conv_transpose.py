"""Transposed convolution in any dimension."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.evaluate import contract_convolution, evaluate
from einconv_kfac.evaluate.recording import is_recorded, takes_kernels
from einconv_kfac.expressions import convNd_input_vjp
from einconv_kfac.expressions.shapes import check_transposed_weight, spatial_size
from einconv_kfac.functionals.operands import batched, checked, finished
from einconv_kfac.functionals.tracing import records_torchs, traced_conv_transpose
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    conv_transpose_geometry,
    hashable,
)
from einconv_kfac.geometry.spellings import as_flag, as_integer
from einconv_kfac.network import Shape, cached


def conv_transposeNd(  # noqa: N802 (in line with convNd)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    simplify: bool = True,
) -> Tensor:
    """Apply a transposed convolution, like ``torch.nn.functional.conv_transpose{1,2,3}d``.

    ``y[n,g,ci,i] = x[n,g,co,o] P[k,o,i] W[g,co,ci,k] (+ b[g,ci])``: the adjoint of the
    convolution with the same kernel.

    Args:
        x: Input of shape ``[n, (g co), *o]``, or ``[(g co), *o]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        bias: Vector of shape ``[(g ci)]``.
        stride: Result positions between the windows of adjacent inputs, one number or one per
            dimension.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        groups: Number of channel groups.
        dilation: Result positions between kernel entries.
        simplify: As in `convNd`.

    Returns:
        Tensor of shape ``[n, (g ci), *i]``, or ``[(g ci), *i]``.

    Raises:
        ValueError: If the shapes, types or devices do not match, or as
            `conv_transpose_geometry`.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> conv_transposeNd(torch.rand(2, 4, 7), torch.rand(4, 3, 2), stride=2).shape
    torch.Size([2, 3, 14])
    """
    batch, weight = batched(x, weight)
    if records_torchs(weight):
        options = (stride, padding, output_padding, groups, dilation)
        return traced_conv_transpose(x, weight, bias, *options)
    channels = [as_integer(groups, "groups") * weight.shape[1]] if weight.ndim > 1 else []
    batch, weight, bias = checked(batch, weight, bias, channels)
    keys = map(hashable, (stride, padding, output_padding, dilation, groups))
    geometry_of = _geometry if is_recorded() else _cached_geometry
    geometry = geometry_of(batch.shape[1:], weight.shape, *keys)
    if takes_kernels(as_flag(simplify, "simplify")):
        output = contract_convolution(geometry, "x", weight, batch)
    else:
        network = convNd_input_vjp.network(geometry, batch.shape[0], channels[0], batch.shape[1])
        output = evaluate(network, batch, weight)
    return finished(output, bias, x, weight)


def _geometry(
    x: Shape,
    weight: Shape,
    stride: Sizes,
    padding: Padding,
    output_padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Geometry:
    """Return the convolution whose adjoint is applied to an example ``[(g co), *o]``."""
    sizes = spatial_size((1, *x), "x")
    check_transposed_weight(tuple(weight), x[0], len(sizes), groups)
    kernel = tuple(weight[2:])
    options = (stride, padding, output_padding, dilation, groups)
    return conv_transpose_geometry(sizes, kernel, *options)


_cached_geometry = cached(maxsize=1024)(_geometry)
