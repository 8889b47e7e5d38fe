"""Input JVP of a convolution: ``v[n,g,ci,i] P[k,o,i] W[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions import convNd_forward
from einconv_kfac.expressions.convNd_forward import network
from einconv_kfac.expressions.expression import Bound
from einconv_kfac.geometry import Padding, Sizes

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
    """Return a convolution's input JVP as an einsum expression.

    A convolution is linear in its input, so this is the forward pass with the tangent in its
    place.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        v: Tangent of the input, of shape ``[n, (g ci), *i]``.
        stride: As in `convNd_forward`; so are the others.
        padding: Zeros around the input.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result.

    Raises:
        ValueError: As `convNd_forward`.

    >>> import torch
    >>> einsum_expression(torch.rand(4, 3, 2), torch.rand(2, 3, 8))[2]
    (2, 4, 7)
    """
    options = (stride, padding, dilation, groups, simplify)
    return convNd_forward.einsum_expression(v, weight, *options)
