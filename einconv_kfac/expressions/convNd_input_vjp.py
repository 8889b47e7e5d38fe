"""Input VJP of a convolution: ``W[g,co,ci,k] P[k,o,i] v[n,g,co,o] -> [n,g,ci,i]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import INPUT_VJP
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import weight_vector_size
from einconv_kfac.geometry import Geometry, per_dimension
from einconv_kfac.geometry.spellings import as_integer
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of vector (0) and kernel (1)."""
    v = terms.output_node(geometry, batch, out_channels, slot=0)
    weight = terms.weight_node(geometry, in_channels, out_channels, slot=1)
    return Network(
        nodes=(v, *terms.pattern_nodes(geometry), weight),
        output=("n", "g", "ci", *terms.indices("i", geometry.ndim)),
        shape=(batch, in_channels, *geometry.input_size),
    )


@bound(weight_vector_size, slots=(1, 0), conjugated=INPUT_VJP)
def einsum_expression(v: Shape, weight: Shape, options: Options) -> Network:
    """Return a convolution's input VJP as an einsum expression.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        v: Vector of shape ``[n, (g co), *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[n, (g ci), *i]`` of the result.

    >>> import torch
    >>> weight, v = torch.rand(4, 3, 2), torch.rand(2, 4, 4)
    >>> einsum_expression(weight, v, input_size=8, stride=2)[2]
    (2, 3, 8)
    """
    ndim, groups = len(shapes.spatial_size(v, "v")), as_integer(options.groups, "groups")
    shapes.check_weight(weight, groups * (weight[1] if len(weight) > 1 else 0), ndim, groups)
    sizes = per_dimension(options.input_size, ndim, "input_size")
    geometry = options.geometry(sizes, weight[2:])
    shapes.check_output(v, None, geometry)
    if v[1] != weight[0]:
        raise ValueError(f"`v` must have the {weight[0]} channels of `weight`, got {v[1]}.")
    return network(geometry, v[0], groups * weight[1], weight[0])
