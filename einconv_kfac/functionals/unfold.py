"""Unfolded input (im2col) in any dimension."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.evaluate import evaluate
from einconv_kfac.expressions import convNd_unfold
from einconv_kfac.expressions.terms import spatial_size
from einconv_kfac.geometry import Padding, Sizes, convolution
from einconv_kfac.network import simplified


def unfoldNd(  # noqa: N802 (einconv's name)
    x: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Padding = 0,
    stride: Sizes = 1,
    simplify: bool = True,
) -> Tensor:
    """Unfold the input of a convolution (im2col), like ``torch.nn.functional.unfold``.

    ``u[n,(c k),(o)] = x[n,c,i] P[k,o,i]``, in any dimension.

    Args:
        x: Input of shape ``[n, c, *i]``.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: As in `einconv_kfac.geometry.convolution`.
        stride: Step between windows.
        simplify: Whether to simplify the network first.

    Returns:
        Tensor of shape ``[n, (c *k), (*o)]``.

    Raises:
        ValueError: As `convolution`.

    >>> import torch
    >>> unfoldNd(torch.rand(2, 3, 8), kernel_size=3).shape
    torch.Size([2, 9, 6])
    """
    sizes = spatial_size(tuple(x.shape), "x")
    geometry = convolution(sizes, kernel_size, stride, padding, dilation)
    network = convNd_unfold.network(geometry, x.shape[0], x.shape[1])
    return evaluate(simplified(network) if simplify else network, x)
