"""Unfolded input (im2col): ``x[n,c,i] P[k,o,i] -> [n,(c k),(o)]``."""

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
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0)."""
    x = plain_node("i", geometry.input_size, batch, channels)
    kernel, output = indices("k", geometry.ndim), indices("o", geometry.ndim)
    return Network(
        nodes=(x, *pattern_nodes(geometry)),
        output=("n", "c", *kernel, *output),
        shape=(batch, channels * prod(geometry.kernel_size), geometry.positions),
    )


def einsum_expression(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    simplify: bool = True,
) -> Bound:
    """Return the unfolded input of a convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, c, *i]``.
        kernel_size: As in ``torch.nn.functional.unfold``, in any dimension; so are the others.
        stride: Step between windows.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (c *k), (*o)]`` of the result.

    Raises:
        ValueError: As `convolution`.

    >>> import torch
    >>> equation, operands, shape = einsum_expression(torch.rand(2, 3, 8), kernel_size=2)
    >>> equation, shape
    ('ab,cdb->acd', (2, 6, 7))
    """
    options = map(hashable, (kernel_size, stride, padding, dilation))
    return _expression(x.shape, *options, simplify).bind(x)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    simplify: bool,
) -> Expression:
    """Return the expression for an input of this shape."""
    sizes = spatial_size(tuple(x), "x")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation)
    return expression(network(geometry, x[0], x[1]), simplify)
