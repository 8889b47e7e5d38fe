"""Unfolded input (im2col): ``x[n,c,i] P[k,o,i] -> [n,(c k),(o)]``."""

from __future__ import annotations

from math import prod

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import ungrouped_input_kernel
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0)."""
    x = terms.plain_node("i", geometry.input_size, batch, channels)
    kernel, output = terms.indices("k", geometry.ndim), terms.indices("o", geometry.ndim)
    return Network(
        nodes=(x, *terms.pattern_nodes(geometry)),
        output=("n", "c", *kernel, *output),
        shape=(batch, channels * prod(geometry.kernel_size), geometry.positions),
    )


@bound(ungrouped_input_kernel)
def einsum_expression(x: Shape, options: Options) -> Network:
    """Return the unfolded input of a convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, c, *i]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (c *k), (*o)]`` of the result.

    >>> import torch
    >>> equation, operands, shape = einsum_expression(torch.rand(2, 3, 8), kernel_size=2)
    >>> equation, shape
    ('ab,cdb->acd', (2, 6, 7))
    """
    return network(options.geometry(shapes.spatial_size(x, "x")), x[0], x[1])
