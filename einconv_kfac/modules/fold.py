"""Layer that adds columns up to an image (col2im), in any dimension."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from einconv_kfac.functionals import foldNd
from einconv_kfac.geometry import Padding, Sizes


class FoldNd(Module):
    """Add columns up to an image (col2im), like ``torch.nn.Fold``, in any dimension.

    Args:
        output_size: Image positions, one per dimension.
        kernel_size: Kernel entries, one number or one per dimension.
        dilation: Step between kernel entries.
        padding: As in `einconv_kfac.geometry.conv_geometry`.
        stride: Step between windows.
        simplify: Whether to fold by views.

    >>> import torch
    >>> FoldNd((5, 5, 5), 3, padding=1)(torch.rand(2, 108, 125)).shape
    torch.Size([2, 4, 5, 5, 5])
    """

    def __init__(
        self,
        output_size: Sizes,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        padding: Padding = 0,
        stride: Sizes = 1,
        simplify: bool = True,
    ) -> None:
        """Keep the hyper-parameters."""
        super().__init__()
        self.output_size = output_size
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride
        self.simplify = simplify

    def forward(self, x: Tensor) -> Tensor:
        """Fold columns ``[n, (c *k), (*o)]`` into ``[n, c, *i]``."""
        options = (self.dilation, self.padding, self.stride, self.simplify)
        return foldNd(x, self.output_size, self.kernel_size, *options)

    def extra_repr(self) -> str:
        """Return the hyper-parameters as torch's layer shows them."""
        return (
            f"output_size={self.output_size}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, padding={self.padding}, stride={self.stride}"
        )
