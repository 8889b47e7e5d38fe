"""Layer that unfolds its input (im2col), in any dimension."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from einconv_kfac.functionals import unfoldNd
from einconv_kfac.geometry import Padding, Sizes


class UnfoldNd(Module):
    """Unfold an input (im2col), like ``torch.nn.Unfold``, in any dimension.

    Args:
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        stride: Step between windows.
        simplify: Whether to simplify the tensor network first.

    >>> import torch
    >>> UnfoldNd(3, padding=1)(torch.rand(2, 4, 5, 5, 5)).shape
    torch.Size([2, 108, 125])
    """

    def __init__(
        self,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        padding: Padding = 0,
        stride: Sizes = 1,
        simplify: bool = True,
    ) -> None:
        """Keep the hyper-parameters."""
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride
        self.simplify = simplify

    def forward(self, x: Tensor) -> Tensor:
        """Unfold an input ``[n, c, *i]`` into ``[n, (c *k), (*o)]``."""
        options = (self.kernel_size, self.dilation, self.padding, self.stride, self.simplify)
        return unfoldNd(x, *options)

    def extra_repr(self) -> str:
        """Return the hyper-parameters as torch's layer shows them."""
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"padding={self.padding}, stride={self.stride}"
        )
