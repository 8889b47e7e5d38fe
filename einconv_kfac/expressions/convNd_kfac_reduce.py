"""KFAC-reduce input factor: ``1/(N O^2) x P P' x' -> [g,(ci k),(ci' k')]``."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import expression, input_factor, spatial_size
from einconv_kfac.geometry import Geometry, Padding, Sizes, convolution, hashable
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0) with itself."""
    scale = Fraction(1, max(batch, 1) * geometry.positions**2)
    return input_factor(geometry, batch, channels, "'", scale)


def einsum_expression(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return the KFAC-reduce input factor of a convolution as an einsum expression.

    The mean over examples of ``a a^T``, where ``a`` is the mean over positions ``o`` of the
    columns of the unfolded input (Eschenhagen et al., 2023).

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: As in ``torch.nn.functional.conv2d``, in any dimension; so are the others.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[g, (ci *k), (ci *k)]`` of the result.

    Raises:
        ValueError: If the groups do not divide the channels, or as `convolution`.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 8), kernel_size=3, groups=2)[2]
    (2, 6, 6)
    """
    options = (*map(hashable, (kernel_size, stride, padding, dilation)), groups, simplify)
    return _expression(x.shape, *options).bind(x)


@cached(maxsize=1024)
def _expression(
    x: Shape,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for an input of this shape."""
    sizes = spatial_size(tuple(x), "x")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation, groups)
    return expression(network(geometry, x[0], x[1]), simplify)
