"""Input VJP of a transposed convolution: ``v[n,g,ci,i] P[k,o,i] W[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.convNd_forward import network
from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import check_weight, expression, spatial_size
from einconv_kfac.geometry import Padding, Sizes, convolution, hashable
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape

__all__ = ["einsum_expression", "network"]


def einsum_expression(
    weight: Tensor,
    v: Tensor,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return a transposed convolution's input VJP, a convolution, as an einsum expression.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        v: Vector of shape ``[n, (g ci), *i]``.
        stride: Step between windows, one number or one per dimension; so are the others.
        padding: Positions removed from the result, left and right.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(4, 3, 2), torch.rand(2, 3, 14), stride=2)[2]
    (2, 4, 7)
    """
    options = (
        *map(
            hashable,
            (
                stride,
                padding,
                dilation,
            ),
        ),
        groups,
        simplify,
    )
    return _expression(weight.shape, v.shape, *options).bind(v, weight)


@cached(maxsize=1024)
def _expression(
    weight: Shape,
    v: Shape,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    sizes = spatial_size(tuple(v), "v")
    check_weight(tuple(weight), v[1], len(sizes), groups)
    geometry = convolution(sizes, tuple(weight[2:]), stride, padding, dilation, groups)
    return expression(network(geometry, v[0], v[1], weight[0]), simplify)
