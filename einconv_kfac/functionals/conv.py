"""Convolution in any dimension."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.expressions import convNd_forward
from einconv_kfac.expressions.terms import check_bias, check_weight, spatial_size
from einconv_kfac.geometry import Padding, Sizes, convolution
from einconv_kfac.network import simplified


def convNd(  # noqa: N802 (einconv's name)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Tensor:
    """Convolve in any dimension, like ``torch.nn.functional.conv{1,2,3}d``.

    ``y[n,g,co,o] = x[n,g,ci,i] P[k,o,i] W[g,co,ci,k] (+ b[g,co])``, one pattern ``P`` per
    dimension.

    Args:
        x: Input of shape ``[n, (g ci), *i]``, or ``[(g ci), *i]``.
        weight: Kernel of shape ``[(g co), ci, *k]``.
        bias: Vector of shape ``[(g co)]``.
        stride: Step between windows, one number or one per dimension.
        padding: As in `einconv_kfac.geometry.convolution`.
        dilation: Step between kernel entries.
        groups: Number of channel groups.
        simplify: Whether to simplify the network first.

    Returns:
        Tensor of shape ``[n, (g co), *o]``, or ``[(g co), *o]``.

    Raises:
        ValueError: If the shapes do not match, or as `convolution`.

    >>> import torch
    >>> convNd(torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), stride=2).shape
    torch.Size([2, 4, 3, 3])
    """
    if x.ndim == weight.ndim - 1:
        options = (bias, stride, padding, dilation, groups, simplify)
        return convNd(x.unsqueeze(0), weight, *options).squeeze(0)
    sizes = spatial_size(tuple(x.shape), "x")
    check_weight(tuple(weight.shape), x.shape[1], len(sizes), groups)
    check_bias(bias, weight.shape[0])
    geometry = convolution(sizes, tuple(weight.shape[2:]), stride, padding, dilation, groups)
    network = convNd_forward.network(geometry, x.shape[0], x.shape[1], weight.shape[0])
    output = evaluate(simplified(network) if simplify else network, x, weight)
    return output if bias is None else output + bias.reshape(-1, *[1] * len(sizes))
