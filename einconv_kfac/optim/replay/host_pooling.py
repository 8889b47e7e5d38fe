"""Max pooling without a graph on the host, several times as fast as torch's.

torch pools tensors that are stored channel by channel one entry at a time there. Maxima of strided
views give the same values; where a tangent needs the index of each maximum, a copy that is stored
channels last is pooled, many channels at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from einconv_kfac.torch_versions import make_dual

Option: TypeAlias = int | Sequence[int]
"""An option of a window, for all of its dimensions or for each."""
FEWEST_ENTRIES = 2**14
"""Smaller tensors are left to torch: the launches of several operations cost more there."""
FEWEST_CHANNELS = 8
"""Fewer are not worth a copy that is stored channels last."""
_DIMENSIONS = {
    torch.max_pool2d: 2,
    torch.max_pool3d: 3,
    functional.max_pool2d: 2,
    functional.max_pool3d: 3,
}
"""The dimensions of windows by the functions that are called for them. In one dimension torch is
fast."""
_INDEXED = {
    2: (functional.max_pool2d, torch.channels_last),
    3: (functional.max_pool3d, torch.channels_last_3d),
}
"""Functions that return indices, and the layouts in which they are fast, by these dimensions."""


class HostPooling(TorchFunctionMode):
    """A context in which max pooling without a graph takes the faster way on the host.

    Values and tangents are those of torch: of equal entries of a window the first one counts.

    Attributes:
        is_used: Whether max pooling was called inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = dict(kwargs or {})
        if func not in _DIMENSIONS:
            return func(*args, **kwargs)
        self.is_used = True
        args = *args, *(kwargs.pop(name) for name in ("input",) if name in kwargs)
        kwargs.pop("return_indices", None)  # another function returns them
        return _max_pool(func, *args, **kwargs)


def _max_pool(
    pool: Any,
    x: Tensor,
    kernel_size: Option,
    stride: Option | None = None,
    padding: Option = 0,
    dilation: Option = 1,
    ceil_mode: bool = False,
) -> Any:
    """Return what a function of torch for max pooling returns, for its arguments."""
    count = _DIMENSIONS[pool]
    options = kernel_size, stride or kernel_size, padding, dilation
    windows = list(zip(*(_repeated(option, count) for option in options)))
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    is_narrow = tangent is not None and x.shape[1] < FEWEST_CHANNELS
    if is_narrow or not _is_slow(x, count) or all(size == 1 for size, *_ in windows):
        return pool(x, *options, ceil_mode)
    if tangent is not None:
        return make_dual(*_with_tangent(value, tangent, count, (*options, ceil_mode)))
    for dim in range(-1, -count - 1, -1):
        value = _maxima(value, dim, windows[dim], ceil_mode)
    return value


def _repeated(option: Option, count: int) -> tuple[int, ...]:
    """Return an option for each of a window's dimensions."""
    each = (option,) if isinstance(option, int) else tuple(option)
    return each * (count // len(each))


def _is_slow(x: Tensor, count: int) -> bool:
    """Return whether torch pools a tensor one entry at a time, and no graph is recorded."""
    is_plain = type(x) in (Tensor, nn.Parameter) and x.is_floating_point()
    is_host = is_plain and x.device.type == "cpu" and x.numel() >= FEWEST_ENTRIES
    recorded = torch.is_grad_enabled() and x.requires_grad
    return is_host and x.ndim == count + 2 and x.is_contiguous() and not recorded


def _maxima(x: Tensor, dim: int, window: tuple[int, ...], ceil_mode: bool) -> Tensor:
    """Return the maxima of windows along one dimension, which is counted from the end.

    Args:
        x: The values.
        dim: The dimension.
        window: Size, stride, padding and dilation of the windows.
        ceil_mode: Whether the last window may end beyond the padding.
    """
    kernel_size, stride, padding, dilation = window
    size, extent = x.shape[dim], (kernel_size - 1) * dilation + 1
    behind = padding
    if ceil_mode:  # a window more, if it starts before the padding behind
        last = -(-(size + 2 * padding - extent) // stride) * stride
        last -= stride if last >= size + padding else 0
        behind = max(padding, last + extent - size - padding)
    if padding or behind:
        x = functional.pad(x, (*(0, 0) * (-dim - 1), padding, behind), value=-torch.inf)
    return reduce(torch.maximum, x.unfold(dim, extent, stride).unbind(-1)[::dilation])


def _with_tangent(
    value: Tensor, tangent: Tensor, count: int, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Return the maxima of windows of ``count`` dimensions, and their tangents."""
    pool, layout = _INDEXED[count]
    maxima, indices = pool(value.contiguous(memory_format=layout), *options, return_indices=True)
    flat = tangent.flatten(-count).gather(-1, indices.flatten(-count))
    return maxima.contiguous(), flat.view(maxima.shape)
