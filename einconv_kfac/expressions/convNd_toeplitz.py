"""Toeplitz matrix of a kernel: ``P[k,o,i] W[g,co,ci,k] -> [g,(co o),(ci i)]``."""

from __future__ import annotations

from math import prod

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import weight_size
from einconv_kfac.geometry import Geometry, per_dimension
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of the kernel (0)."""
    rows = geometry.split_channels(out_channels, "channels of the output") * geometry.positions
    columns = in_channels // geometry.groups * prod(geometry.input_size)
    output, input_ = terms.indices("o", geometry.ndim), terms.indices("i", geometry.ndim)
    return Network(
        nodes=(
            *terms.pattern_nodes(geometry),
            terms.weight_node(geometry, in_channels, out_channels, slot=0),
        ),
        output=("g", "co", *output, "ci", *input_),
        shape=(geometry.groups, rows, columns),
    )


@bound(weight_size)
def einsum_expression(weight: Shape, options: Options) -> Network:
    """Return the matrix of a convolution as an einsum expression, one matrix per group.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[g, (co *o), (ci *i)]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(4, 3, 2), input_size=8, stride=2)[2]
    (1, 16, 24)
    """
    shapes.check_kernel(weight, options.groups)
    sizes = per_dimension(options.input_size, len(weight) - 2, "input_size")
    geometry = options.geometry(sizes, weight[2:])
    return network(geometry, options.groups * weight[1], weight[0])
