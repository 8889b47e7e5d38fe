"""Unfolded input (im2col): ``x[n,c,i] P[k,o,i] -> [n,(c k),(o)]``."""

from __future__ import annotations

from math import prod

from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.signatures import ungrouped_input_kernel
from einconv_kfac.expressions.terms import (
    indices,
    pattern_nodes,
    plain_node,
    spatial_size,
)
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0)."""
    x = plain_node("i", geometry.input_size, batch, channels)
    kernel, output = indices("k", geometry.ndim), indices("o", geometry.ndim)
    return Network(
        nodes=(x, *pattern_nodes(geometry)),
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
    return network(options.geometry(spatial_size(x, "x")), x[0], x[1])
