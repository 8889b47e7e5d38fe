"""Transposed convolution: ``x[n,g,co,o] P[k,o,i] W[g,co,ci,k] -> [n,g,ci,i]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.convNd_input_vjp import network
from einconv_kfac.expressions.signatures import transposed_input_weight
from einconv_kfac.network import Network, Shape

__all__ = ["einsum_expression", "network"]


@bound(transposed_input_weight)
def einsum_expression(x: Shape, weight: Shape, options: Options) -> Network:
    """Return a transposed convolution, a convolution's input VJP, as an einsum expression.

    Args:
        x: Input of shape ``[n, (g co), *o]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g ci), *i]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 7), torch.rand(4, 3, 2), stride=2)[2]
    (2, 3, 14)
    """
    sizes = shapes.spatial_size(x, "x")
    shapes.check_transposed_weight(weight, x[1], len(sizes), options.groups)
    geometry = options.transposed(sizes, weight[2:])
    return network(geometry, x[0], options.groups * weight[1], x[1])
