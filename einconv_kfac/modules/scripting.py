"""Torch's own layers in place of ours, for ``torch.jit.script``, which compiles Python itself."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd

REMEDY = "`torch.export.export` records it"
CONVOLUTIONS: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Mapping[int, Any] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def scripted_conv(layer: _ConvNd, sides: tuple[tuple[int, int], ...]) -> nn.Module:
    """Return torch's convolution with the parameters of a layer.

    Args:
        layer: The layer.
        sides: Its padding left and right, per dimension.

    Raises:
        ValueError: If torch has no convolution of that dimension.
    """
    even = all(left == right for left, right in sides)
    removed = tuple(left for left, _ in sides) if even else 0
    found: nn.Module = _with_parameters_of(layer, CONVOLUTIONS, removed)
    if layer.padding_mode != "zeros" or not even:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        found.__dict__["padding_mode"] = mode
        found.__dict__["_reversed_padding_repeated_twice"] = list(chain(*reversed(sides)))
    return found


def scripted_conv_transpose(layer: _ConvNd) -> nn.Module:
    """Return torch's transposed convolution with the parameters of a layer.

    Raises:
        ValueError: If torch has none of that dimension, or with that padding.
    """
    if any(isinstance(own, tuple) for own in layer.padding):
        raise ValueError(
            "`padding` must be the same left and right in `torch.jit.script` of ConvTransposeNd, "
            f"got {layer.padding}; {REMEDY}."
        )
    found: nn.Module = _with_parameters_of(layer, TRANSPOSED, layer.padding)
    return found


def refuse_script(name: str) -> NoReturn:
    """Raise the error of a layer that ``torch.jit.script`` cannot compile."""
    raise ValueError(f"{name} cannot be compiled by `torch.jit.script`; {REMEDY}.")


def _with_parameters_of(layer: _ConvNd, kinds: Mapping[int, Any], padding: Any) -> Any:
    """Return torch's layer of as many dimensions, with the same parameters and padding."""
    ndim = len(layer.kernel_size)
    if ndim not in kinds:
        raise ValueError(
            f"`N` must be 1, 2 or 3 in `torch.jit.script` of {type(layer).__name__}, got {ndim}; "
            f"{REMEDY}."
        )
    found = kinds[ndim](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        padding,
        dilation=layer.dilation,
        **({"output_padding": layer.output_padding} if layer.transposed else {}),
        groups=layer.groups,
        bias=layer.bias is not None,
        device="meta",
    )
    found.weight, found.bias = layer.weight, layer.bias
    return found.train(layer.training)
