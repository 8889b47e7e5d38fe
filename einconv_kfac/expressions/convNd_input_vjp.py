"""Input VJP of a convolution: ``W[g,co,ci,k] P[k,o,i] v[n,g,co,o] -> [n,g,ci,i]``."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.terms import (
    check_output,
    check_weight,
    expression,
    indices,
    output_node,
    pattern_nodes,
    weight_node,
)
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    convolution,
    hashable,
    per_dimension,
)
from einconv_kfac.network import Network
from einconv_kfac.network.cache import cached
from einconv_kfac.network.step import Shape


@cached(maxsize=1024)
def network(geometry: Geometry, batch: int, in_channels: int, out_channels: int) -> Network:
    """Return the contraction of vector (0) and kernel (1)."""
    v = output_node(geometry, batch, out_channels, slot=0)
    weight = weight_node(geometry, in_channels, out_channels, slot=1)
    return Network(
        nodes=(v, *pattern_nodes(geometry), weight),
        output=("n", "g", "ci", *indices("i", geometry.ndim)),
        shape=(batch, in_channels, *geometry.input_size),
    )


def einsum_expression(
    weight: Tensor,
    v: Tensor,
    input_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Bound:
    """Return a convolution's input VJP as an einsum expression.

    Args:
        weight: Kernel of shape ``[(g co), ci, *k]``.
        v: Vector of shape ``[n, (g co), *o]``.
        input_size: Input positions, one number or one per dimension.
        stride: As in ``torch.nn.functional.conv2d``, in any dimension; so are the others.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the expression.

    Returns:
        Equation, operands, and the shape ``[n, (g ci), *i]`` of the result.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> weight, v = torch.rand(4, 3, 2), torch.rand(2, 4, 4)
    >>> einsum_expression(weight, v, input_size=8, stride=2)[2]
    (2, 3, 8)
    """
    options = (*map(hashable, (input_size, stride, padding, dilation)), groups, simplify)
    return _expression(weight.shape, v.shape, *options).bind(v, weight)


@cached(maxsize=1024)
def _expression(
    weight: Shape,
    v: Shape,
    input_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    simplify: bool,
) -> Expression:
    """Return the expression for tensors of these shapes."""
    weight, v = tuple(weight), tuple(v)
    ndim = len(v) - 2
    check_weight(weight, groups * (weight[1] if len(weight) > 1 else 0), ndim, groups)
    sizes = per_dimension(input_size, ndim, "input_size")
    geometry = convolution(sizes, weight[2:], stride, padding, dilation, groups)
    check_output(v, None, geometry)
    if v[1] != weight[0]:
        raise ValueError(f"`v` must have the {weight[0]} channels of `weight`, got {v[1]}.")
    return expression(network(geometry, v[0], groups * weight[1], weight[0]), simplify)
