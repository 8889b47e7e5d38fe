"""Fold layer (col2im) in any dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.functionals import foldNd
from einconv_kfac.geometry import Padding, Sizes
from einconv_kfac.geometry.spellings import as_sizes
from einconv_kfac.modules.windows import WindowsNd

torch.fx.wrap("foldNd")  # a symbolic trace has a call of the function


class FoldNd(WindowsNd):
    """Sum columns into an image (col2im), like ``torch.nn.Fold``, in any dimension.

    Args:
        output_size: Number of image positions, one per dimension; a number is one dimension.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Input positions between kernel entries.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        stride: Input positions between windows.
        simplify: Whether to fold by views; otherwise the network is contracted as given.

    Raises:
        ValueError: If a hyper-parameter is out of range.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> FoldNd((5, 5, 5), 3, padding=1)(torch.rand(2, 108, 125)).shape
    torch.Size([2, 4, 5, 5, 5])
    """

    shown = ("output_size", *WindowsNd.shown)

    def __init__(
        self, output_size: Sizes, kernel_size: Sizes,
        dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, simplify: bool = True,
    ) -> None:  # fmt: skip
        """Keep the hyper-parameters."""
        super().__init__(kernel_size, dilation, padding, stride, simplify)
        as_sizes(output_size, "output_size")
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Fold columns ``[n, (c *k), (*o)]`` into ``[n, c, *i]``."""
        options = (self.dilation, self.padding, self.stride, self.simplify)
        return foldNd(x, self.output_size, self.kernel_size, *options)
