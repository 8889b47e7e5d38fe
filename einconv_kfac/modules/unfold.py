"""Unfold layer (im2col) in any dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.functionals import unfoldNd
from einconv_kfac.geometry import Padding, Sizes
from einconv_kfac.modules.windows import WindowsNd

torch.fx.wrap("unfoldNd")  # a symbolic trace has a call of the function


class UnfoldNd(WindowsNd):
    """Unfold an input (im2col), like ``torch.nn.Unfold``, in any dimension.

    Args:
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Input positions between kernel entries.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        stride: Input positions between windows.
        simplify: Whether to unfold by views; otherwise the network is contracted as given.

    Raises:
        ValueError: If a hyper-parameter is out of range.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> UnfoldNd(3, padding=1)(torch.rand(2, 4, 5, 5, 5)).shape
    torch.Size([2, 108, 125])
    """

    def __init__(
        self, kernel_size: Sizes,
        dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, simplify: bool = True,
    ) -> None:  # fmt: skip
        """Keep the hyper-parameters."""
        super().__init__(kernel_size, dilation, padding, stride, simplify)

    def forward(self, x: Tensor) -> Tensor:
        """Unfold an input ``[n, c, *i]`` into ``[n, (c *k), (*o)]``."""
        options = (self.kernel_size, self.dilation, self.padding, self.stride, self.simplify)
        return unfoldNd(x, *options)
