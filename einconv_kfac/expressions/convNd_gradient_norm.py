"""Squared norm of every example's weight VJP: ``sum (x P v)^2 -> [n]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import WEIGHT_VJP_PAIR
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import input_vector
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and vector (1), each with itself."""
    return Network(
        nodes=terms.gradient_pair_nodes(geometry, batch, in_channels, out_channels),
        output=("n",),
        shape=(batch,),
    )


@bound(input_vector, conjugated=WEIGHT_VJP_PAIR)
def einsum_expression(x: Shape, v: Shape, options: Options) -> Network:
    """Return the squared norm of every example's weight VJP as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        v: Vector of shape ``[n, (g co), *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n]`` of the result.

    >>> import torch
    >>> x, v = torch.rand(2, 3, 8), torch.rand(2, 4, 7)
    >>> einsum_expression(x, v, kernel_size=2)[2]
    (2,)
    """
    geometry = options.geometry(shapes.spatial_size(x, "x"))
    shapes.check_output(v, x[0], geometry)
    return network(geometry, x[0], x[1], v[1])
