"""Transposed convolution: ``x[n,g,co,o] P[k,o,i] W[g,co,ci,k] -> [n,g,ci,i]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.convNd_input_vjp import network
from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import check_transposed_weight, expression, spatial_size
from einconv_kfac.geometry import Padding, Sizes, hashable, transposed_convolution
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape

__all__ = ["einsum_expression", "network"]


def einsum_expression(
    x: Tensor,
    weight: Tensor,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return a transposed convolution, a convolution's input VJP, as an einsum expression.

    Args:
        x: Input of shape ``[n, (g co), *o]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (g ci), *i]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `transposed_convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 7), torch.rand(4, 3, 2), stride=2)[2]
    (2, 3, 14)
    """
    options = (
        *map(
            hashable,
            (
                stride,
                padding,
                output_padding,
                dilation,
            ),
        ),
        groups,
        simplify,
    )
    return _expression(x.shape, weight.shape, *options).bind(x, weight)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    weight: Shape,
    stride: Sizes,
    padding: Padding,
    output_padding: Sizes,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(x), "x")
    check_transposed_weight(tuple(weight), x[1], len(sizes), groups)
    options = (tuple(weight[2:]), stride, padding, output_padding, dilation, groups)
    geometry = transposed_convolution(sizes, *options)
    return expression(network(geometry, x[0], groups * weight[1], x[1]), simplify)
