"""KFAC-reduce input factor of a transposed convolution: ``[g,(ci k),(ci' k')]``."""

from __future__ import annotations

from fractions import Fraction
from math import prod

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import expression, spatial_size, transposed_input_factor
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    hashable,
    output_padding_of,
    transposed_convolution,
)
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0) with itself."""
    scale = Fraction(1, max(batch, 1) * prod(geometry.input_size) ** 2)
    return transposed_input_factor(geometry, batch, channels, "'", scale)


def einsum_expression(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    output_size: Sizes | None = None,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the KFAC-reduce input factor of a transposed convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *o]``.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        output_size: Positions of the result, instead of ``output_padding``.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[g, (ci *k), (ci *k)]`` of the result.

    Raises:
        ValueError: If the groups do not divide the channels, or as `transposed_convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 7), kernel_size=3, groups=2)[2]
    (2, 6, 6)
    """
    options = (
        *map(
            hashable,
            (
                kernel_size,
                stride,
                padding,
                output_padding,
                output_size,
                dilation,
            ),
        ),
        groups,
        simplify,
    )
    return _expression(x.shape, *options).bind(x)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    output_padding: Sizes,
    output_size: Sizes | None,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(x), "x")
    if output_size is not None:
        output_padding = output_padding_of(
            output_size, sizes, kernel_size, stride, padding, dilation
        )

    options = (kernel_size, stride, padding, output_padding, dilation, groups)
    geometry = transposed_convolution(sizes, *options)
    return expression(network(geometry, x[0], x[1]), simplify)
