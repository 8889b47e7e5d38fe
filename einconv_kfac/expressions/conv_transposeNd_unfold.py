"""Unfolded input of a transposed convolution: ``x[n,c,o] P[k,o,i] -> [n,(c k),(i)]``."""

from __future__ import annotations

from math import prod

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    expression,
    indices,
    pattern_nodes,
    plain_node,
    spatial_size,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, hashable, transposed_convolution
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0)."""
    x = plain_node("o", geometry.output_size, batch, channels)
    kernel, target = indices("k", geometry.ndim), indices("i", geometry.ndim)
    return Network(
        nodes=(x, *pattern_nodes(geometry)),
        output=("n", "c", *kernel, *target),
        shape=(batch, channels * prod(geometry.kernel_size), prod(geometry.input_size)),
    )


def einsum_expression(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    simplify: bool = True,
) -> Bound:
    """Return the unfolded input of a transposed convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, c, *o]``.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        dilation: Step between kernel entries.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (c *k), (*i)]`` of the result.

    Raises:
        ValueError: As `transposed_convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 3, 7), kernel_size=2, stride=2)[2]
    (2, 6, 14)
    """
    options = (
        *map(
            hashable,
            (
                kernel_size,
                stride,
                padding,
                output_padding,
                dilation,
            ),
        ),
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
    dilation: Sizes,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(x), "x")
    options = (kernel_size, stride, padding, output_padding, dilation)
    return expression(network(transposed_convolution(sizes, *options), x[0], x[1]), simplify)
