"""Squared norm of every example's weight VJP: ``sum (x P v)^2 -> [n]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    check_output,
    expression,
    input_node,
    output_node,
    pattern_nodes,
    spatial_size,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and vector (1), each with itself."""
    x = input_node(geometry, batch, in_channels, slot=0)
    v = output_node(geometry, batch, out_channels, slot=1)
    other = input_node(geometry, batch, in_channels, slot=0, mark="'", own="i")
    return Network(
        nodes=(
            *(x, *pattern_nodes(geometry), v),
            *(other, *pattern_nodes(geometry, o="'", i="'")),
            output_node(geometry, batch, out_channels, slot=1, mark="'"),
        ),
        output=("n",),
        shape=(batch,),
    )


def einsum_expression(
    x: Tensor,
    v: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Padding = 0,
    stride: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the squared norm of every example's weight VJP as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        v: Vector of shape ``[n, (g co), *o]``.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: As in `einconv_kfac.geometry.convolution`.
        stride: Step between windows, one number or one per dimension; so are the others.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> x, v = torch.rand(2, 3, 8), torch.rand(2, 4, 7)
    >>> einsum_expression(x, v, kernel_size=2)[2]
    (2,)
    """
    options = (
        *map(
            hashable,
            (
                kernel_size,
                dilation,
                padding,
                stride,
            ),
        ),
        groups,
        simplify,
    )
    return _expression(x.shape, v.shape, *options).bind(x, v)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    v: Shape,
    kernel_size: Sizes,
    dilation: Sizes,
    padding: Padding,
    stride: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(x), "x")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation, groups)
    check_output(tuple(v), x[0], geometry)
    return expression(network(geometry, x[0], x[1], v[1]), simplify)
