"""Transposed convolution layer in any dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvTransposeNd

from einconv_kfac.functionals import conv_transposeNd
from einconv_kfac.geometry import Padding, Sizes, per_dimension
from einconv_kfac.geometry.spellings import as_flag
from einconv_kfac.geometry.transposed import transposed_padding
from einconv_kfac.modules.output_size import output_padding_for
from einconv_kfac.modules.parameters import adopt_, check_options, check_sizes
from einconv_kfac.modules.scripting import scripted_conv_transpose

for name in ("conv_transposeNd", "output_padding_for"):
    torch.fx.wrap(name)  # a symbolic trace has a call of the function in place of its operations


class ConvTransposeNd(_ConvTransposeNd):
    """Transposed convolution in ``N`` dimensions, like ``torch.nn.ConvTranspose{1,2,3}d``.

    Parameters, their initialisation and names are those of torch's layer, so that either loads the
    other's ``state_dict``: ``weight`` of shape ``[(g co), ci, *k]``, ``bias`` of ``[(g ci)]``,
    for ``(g co)`` channels in and ``(g ci)`` out.

    Args:
        N: Number of spatial dimensions.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Output positions between the windows of adjacent inputs.
        padding: Positions removed from the output, left and right.
        output_padding: Further positions on the right of the output.
        groups: Number of channel groups.
        bias: Whether to add a bias.
        dilation: Output positions between kernel entries.
        padding_mode: ``"zeros"``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        simplify: As in `einconv_kfac.functionals.convNd`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or the groups do not divide the
            channels.
        TypeError: If an argument is of another type.

    >>> layer = ConvTransposeNd(4, 2, 3, kernel_size=2, stride=2)
    >>> layer(torch.rand(5, 2, 2, 2, 2, 2)).shape
    torch.Size([5, 3, 4, 4, 4, 4])
    """

    def __init__(
        self,
        N: int,  # noqa: N803 (as in ConvNd)
        in_channels: int, out_channels: int, kernel_size: Sizes,
        stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0,
        groups: int = 1, bias: bool = True, dilation: Sizes = 1, padding_mode: str = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        simplify: bool = True,
    ) -> None:  # fmt: skip
        """Check the hyper-parameters and initialise the parameters."""
        check_sizes(N, (in_channels, out_channels), groups)
        check_options(bias, padding_mode, device, dtype, modes=("zeros",))
        sides = transposed_padding(padding, N)
        same = all(left == right for left, right in sides)
        super().__init__(
            in_channels,
            out_channels,
            per_dimension(kernel_size, N, "kernel_size"),
            per_dimension(stride, N, "stride"),
            tuple(left for left, _ in sides) if same else sides,
            per_dimension(dilation, N, "dilation"),
            True,
            per_dimension(output_padding, N, "output_padding", minimum=0),
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.N = N
        self.simplify = as_flag(simplify, "simplify")

    @classmethod
    def from_nn_ConvTranspose(  # noqa: N802 (in line with from_nn_Conv)
        cls, conv_module: _ConvTransposeNd, simplify: bool = True
    ) -> ConvTransposeNd:
        """Return a layer with a copy of the parameters of a torch transposed convolution.

        Args:
            conv_module: A ``torch.nn.ConvTranspose{1,2,3}d`` or a subclass of one.
            simplify: As in `einconv_kfac.functionals.convNd`.

        Raises:
            TypeError: If the module is not a transposed convolution.

        >>> ConvTransposeNd.from_nn_ConvTranspose(torch.nn.ConvTranspose2d(4, 6, 3, stride=2))
        ConvTransposeNd(2, 4, 6, kernel_size=(3, 3), stride=(2, 2))
        """
        if not isinstance(conv_module, _ConvTransposeNd):
            raise TypeError(
                "`conv_module` must be a torch.nn.ConvTranspose1d, ConvTranspose2d or "
                f"ConvTranspose3d, got {type(conv_module).__name__}."
            )
        names = ("stride", "padding", "output_padding", "groups", "dilation", "padding_mode")
        options: dict[str, Any] = {name: getattr(conv_module, name) for name in names}
        channels = conv_module.in_channels, conv_module.out_channels
        ndim, bias = len(conv_module.kernel_size), conv_module.bias is not None
        options |= {"bias": bias, "device": "meta", "simplify": simplify}
        layer = cls(ndim, *channels, conv_module.kernel_size, **options)
        adopt_(layer, conv_module)
        return layer

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve an input ``[n, (g co), *o]``, transposed, into ``[n, (g ci), *i]``.

        Args:
            x: The input.
            output_size: The output's positions ``i``, or its whole shape, instead of
                ``output_padding``.

        Raises:
            ValueError: If the output cannot have that size, or as `conv_transposeNd`.
        """
        extra: Sizes = self.output_padding
        if output_size is not None:
            window = (self.kernel_size, self.stride, self.padding, self.dilation)
            extra = output_padding_for(output_size, x, self.N, window)
        options = (self.stride, self.padding, extra, self.groups, self.dilation, self.simplify)
        return conv_transposeNd(x, self.weight, self.bias, *options)

    def __prepare_scriptable__(self) -> Module:
        """Return torch's own layer with the same parameters.

        Raises:
            ValueError: If torch has none of that dimension, or with that padding.
        """
        return scripted_conv_transpose(self)

    def extra_repr(self) -> str:
        """Return the number of dimensions and the hyper-parameters that torch's layers show."""
        shown = f"{self.N}, {super().extra_repr()}"  # type: ignore[no-untyped-call]
        return shown if self.simplify else f"{shown}, simplify=False"
