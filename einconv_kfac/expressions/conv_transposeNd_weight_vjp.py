"""Weight VJP of a transposed convolution: ``x[n,g,co,o] P[k,o,i] v[n,g,ci,i] -> [g,co,ci,k]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.convNd_weight_vjp import network
from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import check_output, expression, spatial_size
from einconv_kfac.geometry import Padding, Sizes, convolution, hashable
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape

__all__ = ["einsum_expression", "network"]


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
    """Return a transposed convolution's weight VJP as an einsum expression.

    Args:
        x: Input of shape ``[n, (g co), *o]``.
        v: Vector of shape ``[n, (g ci), *i]``.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: Positions removed from the result, left and right.
        stride: Step between windows, one number or one per dimension; so are the others.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[(g co), ci, *k]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> x, v = torch.rand(2, 4, 7), torch.rand(2, 3, 14)
    >>> einsum_expression(x, v, kernel_size=2, stride=2)[2]
    (4, 3, 2)
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
    return _expression(x.shape, v.shape, *options).bind(v, x)


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
    sizes = spatial_size(tuple(v), "v")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation, groups)
    check_output(tuple(x), v[0], geometry, "x")
    return expression(network(geometry, v[0], v[1], x[1]), simplify)
