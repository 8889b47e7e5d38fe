"""Convolution in any dimension."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.evaluate import contract_convolution, evaluate
from einconv_kfac.evaluate.recording import is_recorded, takes_kernels
from einconv_kfac.expressions import convNd_forward
from einconv_kfac.expressions.shapes import check_weight, spatial_size
from einconv_kfac.functionals.operands import batched, checked, finished
from einconv_kfac.functionals.tracing import records_torchs, traced_conv
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    hashable,
    parse_geometry,
)
from einconv_kfac.geometry.spellings import as_flag
from einconv_kfac.network import Shape, cached


def convNd(  # noqa: N802 (einconv's name)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Tensor:
    """Convolve in any dimension, like ``torch.nn.functional.conv{1,2,3}d``.

    ``y[n,g,co,o] = x[n,g,ci,i] P[k,o,i] W[g,co,ci,k] (+ b[g,co])``, one pattern ``P`` per
    dimension.

    Args:
        x: Input of shape ``[n, (g ci), *i]``, or ``[(g ci), *i]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        bias: Vector of shape ``[(g co)]``.
        stride: Input positions between windows, one number or one per dimension.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        dilation: Input positions between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to contract by kernels selected from the sizes; otherwise the
            network is contracted as given, except in code that ``torch.compile`` traces.

    Returns:
        Tensor of shape ``[n, (g co), *o]``, or ``[(g co), *o]``.

    Raises:
        ValueError: If the shapes, types or devices do not match, or as `conv_geometry`.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> convNd(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), stride=2).shape
    torch.Size([2, 4, 3, 3])
    """
    batch, weight = batched(x, weight)
    if records_torchs(weight):
        return traced_conv(x, weight, bias, stride, padding, dilation, groups)
    batch, weight, bias = checked(batch, weight, bias, weight.shape[:1])
    options = map(hashable, (stride, padding, dilation, groups))
    geometry_of = _geometry if is_recorded() else _cached_geometry
    geometry = geometry_of(batch.shape[1:], weight.shape, *options)
    if takes_kernels(as_flag(simplify, "simplify")):
        output = contract_convolution(geometry, "v", batch, weight)
    else:
        sizes = batch.shape[0], batch.shape[1], weight.shape[0]
        output = evaluate(convNd_forward.network(geometry, *sizes), batch, weight)
    return finished(output, bias, x, weight)


def _geometry(
    x: Shape, weight: Shape, stride: Sizes, padding: Padding, dilation: Sizes, groups: int
) -> Geometry:
    """Return the convolution of an example ``[(g ci), *i]`` and a kernel of these shapes."""
    sizes = spatial_size((1, *x), "x")
    check_weight(tuple(weight), x[0], len(sizes), groups)
    return parse_geometry(sizes, tuple(weight[2:]), stride, padding, dilation, groups)


_cached_geometry = cached(maxsize=1024)(_geometry)
