"""Unfold layer of a transposed convolution's input, in any dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einconv_kfac.expressions.shapes import check_tensor, spatial_size
from einconv_kfac.functionals import unfoldNd_transpose
from einconv_kfac.geometry import Padding, Sizes
from einconv_kfac.geometry.spellings import as_sizes
from einconv_kfac.geometry.transposed import transposed_padding
from einconv_kfac.modules.output_size import output_padding_for
from einconv_kfac.modules.windows import WindowsNd

torch.fx.wrap("unfoldNd_transpose")  # a symbolic trace has a call of the function


class UnfoldTransposeNd(WindowsNd):
    """Unfold the input of a transposed convolution, in any dimension.

    With ``W`` the kernel of a group as a matrix ``[ci, (co k)]``, the transposed convolution of an
    input with ``co`` channels is ``W u``, where ``u`` is the unfolded input. The arguments and the
    result are those of ``unfoldNd.UnfoldTransposeNd``.

    Args:
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Result positions between the windows of adjacent inputs.
        padding: Positions removed from the result, left and right.
        output_padding: Further positions on the right of the result.
        dilation: Result positions between kernel entries.
        simplify: Whether to unfold by views; otherwise the network is contracted as given.

    Raises:
        ValueError: If a hyper-parameter is out of range.
        TypeError: If an argument is of another type.

    >>> import torch
    >>> UnfoldTransposeNd(2, stride=2)(torch.rand(2, 3, 5, 5, 5)).shape
    torch.Size([2, 24, 1000])
    """

    shown = ("kernel_size", "stride", "padding", "output_padding", "dilation")

    def __init__(
        self, kernel_size: Sizes,
        stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0, dilation: Sizes = 1,
        simplify: bool = True,
    ) -> None:  # fmt: skip
        """Keep the hyper-parameters."""
        as_sizes(output_padding, "output_padding", minimum=0)
        if isinstance(padding, str):
            transposed_padding(padding, 1)
        super().__init__(kernel_size, dilation, padding, stride, simplify)
        self.output_padding = output_padding

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Unfold an input ``[n, c, *o]`` into ``[n, (c *k), (*i)]``.

        Args:
            x: The input.
            output_size: The positions ``i``, one per dimension, or the whole shape of the
                transposed convolution's output, instead of ``output_padding``.

        Raises:
            ValueError: If the result cannot have that size, or as `unfoldNd_transpose`.
        """
        extra: Sizes = self.output_padding
        if output_size is not None:
            check_tensor(x, "x")
            ndim = len(spatial_size(tuple(x.shape), "x"))
            window = (self.kernel_size, self.stride, self.padding, self.dilation)
            extra = output_padding_for(output_size, x, ndim, window)
        options = (self.stride, self.padding, extra, self.dilation, self.simplify)
        return unfoldNd_transpose(x, self.kernel_size, *options)
