"""Gram matrix of weight VJPs (empirical NTK): ``sum_p J[v,n,p] J[v',n',p] -> [(v n),(v' n')]``."""

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
def network(
    geometry: Geometry, vectors: int, batch: int, in_channels: int, out_channels: int
) -> Network:
    """Return the contraction of input (0) and vectors (1), each with itself."""
    x = input_node(geometry, batch, in_channels, slot=0)
    s = output_node(geometry, batch, out_channels, slot=1, vectors=vectors)
    other = input_node(geometry, batch, in_channels, slot=0, mark="'", own="ni")
    return Network(
        nodes=(
            *(x, *pattern_nodes(geometry), s),
            *(other, *pattern_nodes(geometry, o="'", i="'")),
            output_node(
                geometry, batch, out_channels, slot=1, mark="'", own="vno", vectors=vectors
            ),
        ),
        output=("v", "n", "v'", "n'"),
        shape=(vectors * batch, vectors * batch),
    )


@cached(maxsize=1024)
def bias_network(geometry: Geometry, vectors: int, batch: int, out_channels: int) -> Network:
    """Return the Gram matrix for the bias, of the vectors (0)."""
    s, other = (
        output_node(geometry, batch, out_channels, slot=0, mark=mark, own="vno", vectors=vectors)
        for mark in ("", "'")
    )
    return Network((s, other), ("v", "n", "v'", "n'"), (vectors * batch, vectors * batch))


def einsum_expression(
    x: Tensor,
    s: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Padding = 0,
    stride: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the Gram matrix of a convolution's weight VJPs as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        s: Vectors of shape ``[v, n, (g co), *o]``.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: As in `einconv_kfac.geometry.convolution`.
        stride: Step between windows, one number or one per dimension; so are the others.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[(v n), (v n)]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> x, s = torch.rand(2, 3, 8), torch.rand(5, 2, 4, 7)
    >>> einsum_expression(x, s, kernel_size=2)[2]
    (10, 10)
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
    return _expression(x.shape, s.shape, *options).bind(x, s)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    s: Shape,
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
    check_output(tuple(s[1:]), x[0], geometry, "s")
    return expression(network(geometry, s[0], x[0], x[1], s[2]), simplify)
