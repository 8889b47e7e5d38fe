"""Fold (col2im), the adjoint of unfold: ``z[n,(c k),(o)] P[k,o,i] -> [n,c,i]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import columns
from einconv_kfac.geometry import Geometry
from einconv_kfac.geometry.spellings import as_sizes
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the columns (0)."""
    return Network(
        nodes=(terms.columns_node(geometry, batch, channels), *terms.pattern_nodes(geometry)),
        output=("n", "c", *terms.indices("i", geometry.ndim)),
        shape=(batch, channels, *geometry.input_size),
    )


@bound(columns)
def einsum_expression(z: Shape, options: Options) -> Network:
    """Return the fold of columns into an image as an einsum expression.

    Args:
        z: Columns of shape ``[n, (c *k), (*o)]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, c, *i]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 6, 7), input_size=(8,), kernel_size=2)[2]
    (2, 3, 8)
    """
    geometry = options.geometry(as_sizes(options.input_size, "input_size"))
    channels = shapes.column_channels(z, geometry)
    return network(geometry, z[0], channels)
