"""Diagonal of the GGN of a kernel: ``sum_{v,n} (sum_{o,i} s x P)^2 -> [g,co,ci,k]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.conjugation import WEIGHT_VJP_PAIR
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import input_vectors
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(
    geometry: Geometry, vectors: int, batch: int, in_channels: int, out_channels: int
) -> Network:
    """Return the contraction of input (0) and vectors (1), each with itself."""
    return Network(
        nodes=terms.gradient_pair_nodes(geometry, batch, in_channels, out_channels, vectors),
        output=("g", "co", "ci", *terms.indices("k", geometry.ndim)),
        shape=(out_channels, in_channels // geometry.groups, *geometry.kernel_size),
    )


@built
def bias_network(geometry: Geometry, vectors: int, batch: int, out_channels: int) -> Network:
    """Return the diagonal for the bias, ``sum_{v,n} (sum_o s)^2``, of the vectors (0)."""
    s, other = (
        terms.output_node(geometry, batch, out_channels, slot=0, mark=mark, vectors=vectors)
        for mark in ("", "'")
    )
    return Network((s, other), ("g", "co"), (out_channels,))


@bound(input_vectors, conjugated=WEIGHT_VJP_PAIR)
def einsum_expression(x: Shape, s: Shape, options: Options) -> Network:
    """Return the GGN diagonal of a convolution's kernel as an einsum expression.

    Args:
        x: Input of shape ``[n, (g ci), *i]``.
        s: Backpropagated square root of the loss Hessian, of shape ``[v, n, (g co), *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[(g co), ci, *k]`` of the result.

    >>> import torch
    >>> x, s = torch.rand(2, 3, 8), torch.rand(5, 2, 4, 7)
    >>> einsum_expression(x, s, kernel_size=2)[2]
    (4, 3, 2)
    """
    geometry = options.geometry(shapes.spatial_size(x, "x"))
    shapes.check_output(s[1:], x[0], geometry, "s")
    return network(geometry, s[0], x[0], x[1], s[2])
