"""Convolution layer in any dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd

from einconv_kfac.expressions.shapes import check_tensor, spatial_size
from einconv_kfac.functionals import convNd
from einconv_kfac.geometry import (
    Padding,
    Sizes,
    parse_geometry,
    parse_padding,
    per_dimension,
    same_padding,
)
from einconv_kfac.geometry.spellings import as_flag
from einconv_kfac.modules.parameters import adopt_, check_options, check_sizes
from einconv_kfac.modules.scripting import scripted_conv
from einconv_kfac.padding import pad_input

for name in ("convNd", "padded_by_mode"):
    torch.fx.wrap(name)  # a symbolic trace has a call of the function in place of its operations


class ConvNd(_ConvNd):
    """Convolution in ``N`` dimensions, like ``torch.nn.Conv{1,2,3}d``.

    Parameters, their initialisation and names are those of torch's layer, so that either loads the
    other's ``state_dict``: ``weight`` of shape ``[(g co), ci, *k]``, ``bias`` of ``[(g co)]``.

    Args:
        N: Number of spatial dimensions.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Input positions between windows.
        padding: A number, one number or ``(left, right)`` pair per dimension, ``"valid"`` or
            ``"same"``.
        dilation: Input positions between kernel entries.
        groups: Number of channel groups.
        bias: Whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        simplify: As in `einconv_kfac.functionals.convNd`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or the groups do not divide the
            channels.
        TypeError: If an argument is of another type.

    >>> layer = ConvNd(4, 2, 3, kernel_size=3, padding="same")
    >>> layer(torch.rand(5, 2, 4, 4, 4, 4)).shape
    torch.Size([5, 3, 4, 4, 4, 4])
    """

    def __init__(
        self,
        N: int,  # noqa: N803 (einconv's name)
        in_channels: int, out_channels: int, kernel_size: Sizes,
        stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
        bias: bool = True, padding_mode: str = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        simplify: bool = True,
    ) -> None:  # fmt: skip
        """Check the hyper-parameters and initialise the parameters."""
        check_sizes(N, (in_channels, out_channels), groups)
        check_options(bias, padding_mode, device, dtype)
        kernel = per_dimension(kernel_size, N, "kernel_size")
        steps = per_dimension(dilation, N, "dilation")
        sides = _sides(padding, kernel, steps)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            per_dimension(stride, N, "stride"),
            padding if isinstance(padding, str) else _concise(sides),
            steps,
            False,
            (0,) * N,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.N = N
        self.simplify = as_flag(simplify, "simplify")

    @classmethod
    def from_nn_Conv(cls, conv_module: _ConvNd, simplify: bool = True) -> ConvNd:  # noqa: N802
        """Return a layer with a copy of the parameters of a torch convolution.

        Args:
            conv_module: A ``torch.nn.Conv{1,2,3}d`` or a subclass of one.
            simplify: As in `einconv_kfac.functionals.convNd`.

        Raises:
            TypeError: If the module is not a convolution, or is a transposed one.

        >>> ConvNd.from_nn_Conv(torch.nn.Conv2d(4, 6, 3, stride=2, groups=2))
        ConvNd(2, 4, 6, kernel_size=(3, 3), stride=(2, 2), groups=2)
        """
        if not isinstance(conv_module, _ConvNd) or conv_module.transposed:
            raise TypeError(
                "`conv_module` must be a torch.nn.Conv1d, Conv2d or Conv3d, got "
                f"{type(conv_module).__name__}."
            )
        layer = cls(
            len(conv_module.kernel_size),
            conv_module.in_channels,
            conv_module.out_channels,
            conv_module.kernel_size,
            stride=conv_module.stride,
            padding=conv_module.padding,
            dilation=conv_module.dilation,
            groups=conv_module.groups,
            bias=conv_module.bias is not None,
            padding_mode=conv_module.padding_mode,
            device="meta",
            simplify=simplify,
        )
        adopt_(layer, conv_module)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Convolve an input ``[n, (g ci), *i]`` into ``[n, (g co), *o]``."""
        padding: Padding = self.padding
        if self.padding_mode != "zeros":
            sides = _sides(padding, self.kernel_size, self.dilation)
            x = padded_by_mode(x, sides, self.padding_mode)
            padding = 0
        options = (self.stride, padding, self.dilation, self.groups, self.simplify)
        return convNd(x, self.weight, self.bias, *options)

    def __prepare_scriptable__(self) -> Module:
        """Return torch's own layer with the same parameters.

        Raises:
            ValueError: If torch has none of that dimension.
        """
        return scripted_conv(self, _sides(self.padding, self.kernel_size, self.dilation))

    def extra_repr(self) -> str:
        """Return the number of dimensions and the hyper-parameters that torch's layers show."""
        shown = f"{self.N}, {super().extra_repr()}"  # type: ignore[no-untyped-call]
        return shown if self.simplify else f"{shown}, simplify=False"


def padded_by_mode(x: Tensor, sides: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    """Return the input of a layer with that many dimensions, padded by a mode of torch."""
    check_tensor(x, "x")
    sizes = spatial_size((1, *x.shape) if x.ndim == len(sides) + 1 else tuple(x.shape), "x")
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if mode == "replicate" and not is_traced:  # the other modes limit the padding themselves
        parse_geometry(sizes, 1, padding=sides)
    return pad_input(x, sides, mode)


def _sides(
    padding: Any, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the padding left and right, per dimension."""
    ndim = len(kernel_size)
    word = padding if isinstance(padding, str) else None
    if word == "same":
        return same_padding(kernel_size, dilation, ndim)
    return ((0, 0),) * ndim if word == "valid" else parse_padding(padding, ndim)


def _concise(sides: tuple[tuple[int, int], ...]) -> Any:
    """Return one number per dimension if left and right are equal in all dimensions."""
    return (
        tuple(left for left, _ in sides) if all(left == right for left, right in sides) else sides
    )
