"""Weight VJP of a transposed convolution: ``x[n,g,co,o] P[k,o,i] v[n,g,ci,i] -> [g,co,ci,k]``."""

from __future__ import annotations

from contextlib import suppress

from einconv_kfac.expressions import shapes
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import TRANSPOSED_WEIGHT_VJP
from einconv_kfac.expressions.convNd_weight_vjp import network
from einconv_kfac.expressions.signatures import input_vector
from einconv_kfac.network import Network, Shape

__all__ = ["einsum_expression", "network"]


@bound(input_vector, slots=(1, 0), conjugated=TRANSPOSED_WEIGHT_VJP)
def einsum_expression(v: Shape, x: Shape, options: Options) -> Network:
    """Return a transposed convolution's weight VJP as an einsum expression.

    Args:
        x: Input of shape ``[n, (g co), *o]``.
        v: Vector of shape ``[n, (g ci), *i]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[(g co), ci, *k]`` of the result.

    >>> import torch
    >>> x, v = torch.rand(2, 4, 7), torch.rand(2, 3, 14)
    >>> einsum_expression(x, v, kernel_size=2, stride=2)[2]
    (4, 3, 2)
    """
    geometry = options.geometry(shapes.spatial_size(v, "v"))
    with suppress(ValueError):  # an output padding of the stride or more leaves room for outputs
        geometry = options._replace(output_size=v[2:]).transposed(x[2:])
    shapes.check_output(x, v[0], geometry, "x")
    return network(geometry, v[0], v[1], x[1])
