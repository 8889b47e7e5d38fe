"""The tensors of a functional: checks and casts before the contraction, bias and layout after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def batched(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input with a batch dimension, and the kernel."""
    return (x.unsqueeze(0) if x.ndim == weight.ndim - 1 else x), weight


def checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors, cast to autocast's type if autocast is on.

    Raises:
        ValueError: If their devices or types differ, or the bias does not have one entry per
            output channel.
    """
    if bias is not None and tuple(bias.shape) != tuple(channels):
        raise ValueError(
            f"`bias` must have one entry per output channel, shape {list(channels)}, got "
            f"{list(bias.shape)}."
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on {x.device}, as `x`, got {tensor.device}.")
        if tensor.dtype != x.dtype:
            raise ValueError(f"`{name}` must be {x.dtype}, as `x`, got {tensor.dtype}.")
    return x, weight, bias


def with_bias(output: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """Add a bias per channel, and give the output the batch dimension and layout of ``like``."""
    if bias is not None:
        output = output + bias.reshape(-1, *[1] * (output.ndim - 2))
    if like.ndim < output.ndim:
        return output.squeeze(0)
    layout = _channels_last(like)
    return output if layout is None else output.contiguous(memory_format=layout)


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """Return torch's layout with the channels last if the tensor has it, else None."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None or x.is_contiguous():
        return None
    return layout if x.is_contiguous(memory_format=layout) else None
