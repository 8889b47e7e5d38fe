"""The index pattern of a convolution along one dimension, as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.geometry import Axis, conv_geometry
from einconv_kfac.geometry.spellings import as_integer

CPU = torch.device("cpu")


def index_pattern(
    input_size: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Return the index pattern of a convolution along one dimension.

    ``P[k, o, i] = 1`` iff ``i = o * stride + k * dilation - padding_left``.

    Returns:
        Tensor of shape ``[kernel_size, output_size, input_size]``.

    Raises:
        ValueError: If the hyper-parameters describe no convolution.
        TypeError: If an argument is of another type.

    >>> index_pattern(4, 2, stride=2, dtype=torch.int)[0]
    tensor([[1, 0, 0, 0],
            [0, 0, 1, 0]], dtype=torch.int32)
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {dtype!r}.")
    check_device(device)
    (axis,) = conv_geometry(
        (as_integer(input_size, "input_size"),), kernel_size, stride, padding, dilation
    ).axes
    return pattern_tensor(axis, device, dtype)


def check_device(device: object) -> None:
    """Raise an error if an argument is neither a device nor a device's name or number."""
    if isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"`device` must be a torch.device, got {device!r}.")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be a torch.device or its name, got {device!r}.") from error


def pattern_tensor(axis: Axis, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the pattern of an axis, of shape ``[k, o, i]``."""
    kernel = torch.arange(axis.kernel_size, device=device)[:, None, None]
    output = torch.arange(axis.output_size, device=device)[:, None]
    position = output * axis.stride + kernel * axis.dilation - axis.padding[0]  # [k, o, 1]
    return (position == torch.arange(axis.input_size, device=device)).to(dtype)


def recognized_axis(tensor: Tensor) -> Axis | None:
    """Return the axis whose index pattern has the values of a tensor.

    None if there is no such axis, or if the values cannot be read.
    """
    if tensor.ndim != 3 or 0 in tensor.shape or tensor.requires_grad or not _concrete(tensor):
        return None
    ones = tensor.nonzero()
    if len(ones) == 0 or len(ones) > tensor.shape[0] * tensor.shape[1]:
        return None
    axis = _fitted(tuple(tensor.shape), ones)
    if axis is None:
        return None
    return axis if torch.equal(pattern_tensor(axis, tensor.device, tensor.dtype), tensor) else None


def _concrete(tensor: Tensor) -> bool:
    """Return whether the tensor is an ordinary one whose values can be read."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _fitted(shape: tuple[int, ...], ones: Tensor) -> Axis | None:
    """Return an axis that fits the first of the ones, at ``[entries, (k, o, i)]``, or None."""
    entries = {(k, o): i for k, o, i in ones.tolist()}
    kernel_size, output_size, input_size = shape
    dilation = _step(entries, (1, 0)) or 1
    stride = _step(entries, (0, 1)) or (1 if output_size > 1 else input_size)
    (k, o), i = next(iter(entries.items()))
    left = o * stride + k * dilation - i
    right = (output_size - 1) * stride + (kernel_size - 1) * dilation + 1 - left - input_size
    if min(dilation, stride) < 1 or left < 0:
        return None
    fitted = Axis(input_size, kernel_size, stride, (left, max(0, right)), dilation)
    return fitted if fitted.output_size == output_size else None


def _step(entries: dict[tuple[int, int], int], by: tuple[int, int]) -> int:
    """Return the input positions from one entry to the next, 0 if no two entries are adjacent."""
    for (k, o), i in entries.items():
        following = entries.get((k + by[0], o + by[1]))
        if following is not None:
            return following - i
    return 0
