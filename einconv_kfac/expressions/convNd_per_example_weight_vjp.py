"""Weight VJP per example: ``x[n,g,ci,i] P[k,o,i] v[n,g,co,o] -> [n,g,co,ci,k]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import WEIGHT_VJP
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import input_vector
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and vector (1)."""
    per_group = in_channels // geometry.groups
    return Network(
        nodes=terms.gradient_nodes(geometry, batch, in_channels, out_channels),
        output=("n", "g", "co", "ci", *terms.indices("k", geometry.ndim)),
        shape=(batch, out_channels, per_group, *geometry.kernel_size),
    )


@built
def bias_network(geometry: Geometry, batch: int, out_channels: int) -> Network:
    """Return the bias VJP per example, ``sum_o v``, of the vector (0)."""
    v = terms.output_node(geometry, batch, out_channels, slot=0)
    return Network((v,), ("n", "g", "co"), (batch, out_channels))


@bound(input_vector, conjugated=WEIGHT_VJP)
def einsum_expression(x: Shape, v: Shape, options: Options) -> Network:
    """Return a convolution's weight VJP, one per example, as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        v: Vector of shape ``[n, (g co), *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g co), ci, *k]`` of the result.

    >>> import torch
    >>> x, v = torch.rand(2, 3, 8), torch.rand(2, 4, 7)
    >>> einsum_expression(x, v, kernel_size=2)[2]
    (2, 4, 3, 2)
    """
    geometry = options.geometry(shapes.spatial_size(x, "x"))
    shapes.check_output(v, x[0], geometry)
    return network(geometry, x[0], x[1], v[1])
