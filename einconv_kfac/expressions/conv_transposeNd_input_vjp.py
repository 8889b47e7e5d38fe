"""Input VJP of a transposed convolution: ``v[n,g,ci,i] P[k,o,i] W[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import INPUT_VJP
from einconv_kfac.expressions.convNd_forward import network, network_of
from einconv_kfac.expressions.signatures import weight_vector
from einconv_kfac.network import Network, Shape

__all__ = ["einsum_expression", "network"]


@bound(weight_vector, slots=(1, 0), conjugated=INPUT_VJP)
def einsum_expression(v: Shape, weight: Shape, options: Options) -> Network:
    """Return a transposed convolution's input VJP, a convolution, as an einsum expression.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        v: Vector of shape ``[n, (g ci), *i]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result. If the output
        padding is the stride or more, it has positions after those of the input, to be dropped.

    >>> import torch
    >>> einsum_expression(torch.rand(4, 3, 2), torch.rand(2, 3, 14), stride=2)[2]
    (2, 4, 7)
    """
    return network_of(v, weight, options, "v")
