"""Fold (col2im), the adjoint of unfold: ``z[n,(c k),(o)] P[k,o,i] -> [n,c,i]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    column_channels,
    columns_node,
    expression,
    indices,
    pattern_nodes,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable, per_dimension
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the columns (0)."""
    return Network(
        nodes=(columns_node(geometry, batch, channels), *pattern_nodes(geometry)),
        output=("n", "c", *indices("i", geometry.ndim)),
        shape=(batch, channels, *geometry.input_size),
    )


def einsum_expression(
    z: Tensor,
    input_size: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    simplify: bool = True,
) -> Bound:
    """Return the fold of columns into an image as an einsum expression.

    Args:
        z: Columns of shape ``[n, (c *k), (*o)]``.
        input_size: Input positions, one per dimension.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, c, *i]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 6, 7), input_size=(8,), kernel_size=2)[2]
    (2, 3, 8)
    """
    options = (
        *map(
            hashable,
            (
                input_size,
                kernel_size,
                stride,
                padding,
                dilation,
            ),
        ),
        simplify,
    )
    return _expression(z.shape, *options).bind(z)


@cached(maxsize=1024)
def _expression(
    z: Shape,
    input_size: Sizes,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    ndim = 1 if isinstance(input_size, int) else len(input_size)
    sizes = per_dimension(input_size, ndim, "input_size")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation)
    return expression(network(geometry, z[0], column_channels(z, geometry)), simplify)
