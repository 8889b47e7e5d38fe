"""Checks of a convolution layer's options, and parameters copied from another layer."""

from __future__ import annotations

import torch
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd

from einconv_kfac.expressions.pattern import check_device
from einconv_kfac.geometry.spellings import as_integer
from einconv_kfac.padding import PADDING_MODES


def check_sizes(ndim: int, channels: tuple[int, int], groups: int) -> None:
    """Raise an error that names a number that torch's layers do not check.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small.
    """
    as_integer(ndim, "N", minimum=1)
    for name, value in zip(("in_channels", "out_channels"), channels):
        as_integer(value, name, minimum=0)
    as_integer(groups, "groups", minimum=1)


def check_options(
    bias: bool,
    padding_mode: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    modes: tuple[str, ...] = PADDING_MODES,
) -> None:
    """Raise an error that names an option that torch's layers do not check.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If the padding mode is unknown, or the type has no gradients.
    """
    if not isinstance(bias, int):
        raise TypeError(f"`bias` must be True or False, got {bias!r}.")
    if not isinstance(padding_mode, str):
        raise TypeError(f"`padding_mode` must be a string, got {padding_mode!r}.")
    if padding_mode not in modes:
        raise ValueError(f"`padding_mode` must be one of {modes}, got {padding_mode!r}.")
    if device is not None:
        check_device(device)
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {dtype!r}.")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"`dtype` must be of floating-point or complex numbers, got {dtype}.")


def adopt_(layer: _ConvNd, source: _ConvNd) -> None:
    """Give a layer copies of another's parameters, and its training flag."""
    for name in ("weight", "bias"):
        parameter: Parameter | None = getattr(source, name)
        if parameter is not None:
            copy = parameter.detach().clone()
            parameter = Parameter(copy, requires_grad=parameter.requires_grad)
        setattr(layer, name, parameter)
    layer.train(source.training)
