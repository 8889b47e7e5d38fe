"""Weight JVP of a convolution: ``x[n,g,ci,i] P[k,o,i] v[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.convNd_forward import network, network_of
from einconv_kfac.expressions.signatures import input_tangent
from einconv_kfac.network import Network, Shape

__all__ = ["einsum_expression", "network"]


@bound(input_tangent)
def einsum_expression(x: Shape, v: Shape, options: Options) -> Network:
    """Return a convolution's weight JVP as an einsum expression.

    A convolution is linear in its kernel, so this is the forward pass with the tangent as kernel.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        v: Tangent of the kernel, of shape ``[(g co), ci, *k]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 3, 8), torch.rand(4, 3, 2))[2]
    (2, 4, 7)
    """
    return network_of(x, v, options)
