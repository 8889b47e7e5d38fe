"""Forward pass of a convolution: ``x[n,g,ci,i] P[k,o,i] W[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    check_weight,
    expression,
    indices,
    input_node,
    pattern_nodes,
    spatial_size,
    weight_node,
)
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and kernel (1)."""
    x = input_node(geometry, batch, in_channels, slot=0)
    weight = weight_node(geometry, in_channels, out_channels, slot=1)
    return Network(
        nodes=(x, *pattern_nodes(geometry), weight),
        output=("n", "g", "co", *indices("o", geometry.ndim)),
        shape=(batch, out_channels, *geometry.output_size),
    )


def einsum_expression(
    x: Tensor,
    weight: Tensor,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the forward pass of a convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        stride: As in ``torch.nn.functional.conv2d``, in any dimension; so are the others.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 8), torch.rand(4, 3, 2)
    >>> equation, operands, shape = einsum_expression(x, weight, stride=2)
    >>> equation, list(torch.einsum(equation, *operands).reshape(shape).shape)
    ('abcd,ebd->aec', [2, 4, 4])
    """
    options = (*map(hashable, (stride, padding, dilation)), groups, simplify)
    return _expression(x.shape, weight.shape, *options).bind(x, weight)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    weight: Shape,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(x), "x")
    check_weight(tuple(weight), x[1], len(sizes), groups)
    geometry = convolution(sizes, tuple(weight[2:]), stride, padding, dilation, groups)
    return expression(network(geometry, x[0], x[1], weight[0]), simplify)
