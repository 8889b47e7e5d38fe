"""KFAC-reduce input factor of a transposed convolution: ``[g,(ci k),(ci' k')]``."""

from __future__ import annotations

from einconv_kfac.expressions import shapes, terms
from einconv_kfac.expressions.call import Options, bound
from einconv_kfac.expressions.construction import built
from einconv_kfac.expressions.signatures import transposed_input_kernel_size
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Network, Shape


@built
def network(geometry: Geometry, batch: int, channels: int) -> Network:
    """Return the contraction of the input (0) with itself."""
    return terms.transposed_input_factor(geometry, batch, channels, reduce=True)


@bound(transposed_input_kernel_size)
def einsum_expression(x: Shape, options: Options) -> Network:
    """Return the KFAC-reduce input factor of a transposed convolution as an einsum expression.

    It is the mean over examples of ``a a^T``, where ``a`` is the mean over outputs ``i`` of the
    columns of the unfolded input of `conv_transposeNd_unfold`.

    Args:
        x: Input of shape ``[n, (g ci), *o]``.
        options: OPTIONS

    Returns:
        Equation, operands, and the shape ``[g, (ci *k), (ci *k)]`` of the result.

    >>> import torch
    >>> einsum_expression(torch.rand(2, 4, 7), kernel_size=3, groups=2)[2]
    (2, 6, 6)
    """
    return network(options.transposed(shapes.spatial_size(x, "x")), x[0], x[1])
