"""Unfolded input of a transposed convolution: ``x[n,c,o] P[k,o,i] -> [n,(c k),(i)]``."""

from __future__ import annotations

from math import prod

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import transposed_ungrouped_input_kernel
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0)."""
    x = terms.plain_node("o", geometry.output_size, batch, channels)
    kernel, target = terms.indices("k", geometry.ndim), terms.indices("i", geometry.ndim)
    return Network(
        nodes=(x, *terms.pattern_nodes(geometry)),
        output=("n", "c", *kernel, *target),
        shape=(batch, channels * prod(geometry.kernel_size), prod(geometry.input_size)),
    )


@bound(transposed_ungrouped_input_kernel)
def einsum_expression(x: Shape, options: Options) -> Network:
    """Return the unfolded input of a transposed convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, c, *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (c *k), (*i)]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 3, 7), kernel_size=2, stride=2)[2]
    (2, 6, 14)
    """
    return network(options.transposed(shapes.spatial_size(x, "x")), x[0], x[1])
