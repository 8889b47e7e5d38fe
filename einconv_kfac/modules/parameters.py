"""Sizes of a convolution layer's parameters, and parameters copied from another layer."""

from __future__ import annotations

from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd

from einconv_kfac.geometry import as_integer


def check_sizes(ndim: int, channels: tuple[int, int], groups: int, padding_mode: str) -> None:
    """Raise an error that names what torch's layers do not check.

    Raises:
        TypeError: If a number is not an integer, or the padding mode is no word.
        ValueError: If a number is too small.
    """
    as_integer(ndim, "N", minimum=1)
    for name, value in zip(("in_channels", "out_channels"), channels):
        as_integer(value, name, minimum=0)
    as_integer(groups, "groups", minimum=1)
    if not isinstance(padding_mode, str):
        raise TypeError(f"`padding_mode` must be a string, got {padding_mode!r}.")


def adopt_(layer: _ConvNd, source: _ConvNd) -> None:
    """Give a layer copies of another's parameters, and its training flag."""
    for name in ("weight", "bias"):
        parameter: Parameter | None = getattr(source, name)
        if parameter is not None:
            copy = parameter.detach().clone()
            parameter = Parameter(copy, requires_grad=parameter.requires_grad)
        setattr(layer, name, parameter)
    layer.train(source.training)
