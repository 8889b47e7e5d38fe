"""KFC (KFAC-expand) input factor: ``1/N x P P' x' -> [g,(ci k),(ci' k')]``, ``o`` shared."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import input_kernel
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0) with itself."""
    return terms.input_factor(geometry, batch, channels, reduce=False)


@bound(input_kernel)
def einsum_expression(x: Shape, options: Options) -> Network:
    """Return the KFC input factor of a convolution as an einsum expression.

    It is the mean over examples of the sum over outputs ``o`` of ``a a^T``, where ``a`` is a
    column of the unfolded input (Grosse and Martens, 2016).

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[g, (ci *k), (ci *k)]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 8), kernel_size=3, groups=2)[2]
    (2, 6, 6)
    """
    return network(options.geometry(shapes.spatial_size(x, "x")), x[0], x[1])
