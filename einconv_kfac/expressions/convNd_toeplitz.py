"""Toeplitz matrix of a kernel: ``P[k,o,i] W[g,co,ci,k] -> [g,(co o),(ci i)]``."""

from __future__ import annotations

from math import prod

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    check_kernel,
    expression,
    indices,
    pattern_nodes,
    weight_node,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable, per_dimension
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of the kernel (0)."""
    rows = geometry.split_channels(out_channels, "channels of the output") * geometry.positions
    columns = in_channels // geometry.groups * prod(geometry.input_size)
    output, input_ = indices("o", geometry.ndim), indices("i", geometry.ndim)
    return Network(
        nodes=(*pattern_nodes(geometry), weight_node(geometry, in_channels, out_channels, slot=0)),
        output=("g", "co", *output, "ci", *input_),
        shape=(geometry.groups, rows, columns),
    )


def einsum_expression(
    weight: Tensor,
    input_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the matrix of a convolution as an einsum expression, one matrix per group.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        input_size: Input positions, one number or one per dimension.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[g, (co *o), (ci *i)]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(4, 3, 2), input_size=8, stride=2)[2]
    (1, 16, 24)
    """
    options = (
        *map(
            hashable,
            (
                input_size,
                stride,
                padding,
                dilation,
            ),
        ),
        groups,
        simplify,
    )
    return _expression(weight.shape, *options).bind(weight)


@cached(maxsize=1024)
def _expression(
    weight: Shape,
    input_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    ndim = len(weight) - 2
    check_kernel(tuple(weight), groups)
    sizes = per_dimension(input_size, ndim, "input_size")
    geometry = convolution(sizes, tuple(weight[2:]), stride, padding, dilation, groups)
    return expression(network(geometry, groups * weight[1], weight[0]), simplify)
