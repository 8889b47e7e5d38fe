"""Squared norm of every example's weight VJP: ``sum (x P v)^2 -> [n]``."""

from __future__ import annotations

from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.signatures import input_vector
from einconv_kfac.expressions.terms import (
    check_output,
    input_node,
    output_node,
    pattern_nodes,
    spatial_size,
)
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and vector (1), each with itself."""
    x = input_node(geometry, batch, in_channels, slot=0)
    v = output_node(geometry, batch, out_channels, slot=1)
    other = input_node(geometry, batch, in_channels, slot=0, mark="'", own="i")
    return Network(
        nodes=(
            *(x, *pattern_nodes(geometry), v),
            *(other, *pattern_nodes(geometry, o="'", i="'")),
            output_node(geometry, batch, out_channels, slot=1, mark="'"),
        ),
        output=("n",),
        shape=(batch,),
    )


@bound(input_vector)
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
    geometry = options.geometry(spatial_size(x, "x"))
    check_output(v, x[0], geometry)
    return network(geometry, x[0], x[1], v[1])
