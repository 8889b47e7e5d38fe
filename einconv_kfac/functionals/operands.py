"""The tensors of a functional: checks and casts before the contraction, bias and layout after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einconv_kfac.evaluate.autocast import autocast_is_on
from einconv_kfac.evaluate.layouts import has_channels_last, layout
from einconv_kfac.expressions.shapes import check_tensor


def batched(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input with a batch dimension, and the kernel.

    Raises:
        TypeError: If one is no tensor.
    """
    check_tensor(x, "x")
    check_tensor(weight, "weight")
    return (x.unsqueeze(0) if x.ndim == weight.ndim - 1 else x), weight


def checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors, cast to autocast's type if autocast is on.

    Raises:
        ValueError: If their devices or types differ, or the bias does not have one entry per
            output channel.
        TypeError: If the bias is no tensor.
    """
    if bias is not None:
        check_tensor(bias, "bias")
    if bias is not None and tuple(bias.shape) != tuple(channels):
        raise ValueError(
            f"`bias` must have one entry per output channel, shape {list(channels)}, got "
            f"{list(bias.shape)}."
        )
    if autocast_is_on(x.device):
        x, weight, bias = _cast(x), _cast(weight), None if bias is None else _cast(bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on {x.device}, as `x`, got {tensor.device}.")
        if tensor.dtype != x.dtype:
            raise ValueError(f"`{name}` must be {x.dtype}, as `x`, got {tensor.dtype}.")
    return x, weight, bias


def _cast(tensor: Tensor) -> Tensor:
    """Cast a tensor to autocast's type, as torch does no double, complex or integer numbers."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if eligible else tensor


def finished(output: Tensor, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """Add a bias per channel, and give the output the input's batch dimension, and its layout."""
    if bias is not None:
        output = output + bias.reshape(-1, *[1] * (output.ndim - 2))
    single = x.ndim < output.ndim
    output = output.squeeze(0) if single else output
    if _is_mapped(output):
        return output
    last = not single and has_channels_last(x, weight)
    return output.contiguous(memory_format=layout(output.ndim, last))


def _is_mapped(tensor: Tensor) -> bool:
    """Return whether `torch.func.vmap` maps the tensor; its layout is not the caller's then."""
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
