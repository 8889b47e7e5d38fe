"""Forward pass of a convolution: ``x[n,g,ci,i] P[k,o,i] W[g,co,ci,k] -> [n,g,co,o]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import input_weight
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of input (0) and kernel (1)."""
    x = terms.input_node(geometry, batch, in_channels, slot=0)
    weight = terms.weight_node(geometry, in_channels, out_channels, slot=1)
    return Network(
        nodes=(x, *terms.pattern_nodes(geometry), weight),
        output=("n", "g", "co", *terms.indices("o", geometry.ndim)),
        shape=(batch, out_channels, *geometry.output_size),
    )


def network_of(x: Shape, weight: Shape, options: Options, name: str = "x") -> Network:
    """Return the contraction of an input, called ``name``, and a kernel of these shapes."""
    sizes = shapes.spatial_size(x, name)
    shapes.check_weight(weight, x[1], len(sizes), options.groups)
    return network(options.geometry(sizes, weight[2:]), x[0], x[1], weight[0])


@bound(input_weight)
def einsum_expression(x: Shape, weight: Shape, options: Options) -> Network:
    """Return the forward pass of a convolution as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g co), *o]`` of the result.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 8), torch.rand(4, 3, 2)
    >>> equation, operands, shape = einsum_expression(x, weight, stride=2)
    >>> equation, list(torch.einsum(equation, *operands).reshape(shape).shape)
    ('abcd,ebd->aec', [2, 4, 4])
    """
    return network_of(x, weight, options)
