"""A convolution's three contractions by the device's own library, in one to three dimensions.

On a GPU one call of cuDNN takes the place of the many products of the other kernels. Its precision
is that of ``torch.nn.functional.conv2d``: ``torch.backends.cudnn.allow_tf32`` decides about TF32,
and ``torch.backends.cudnn.deterministic`` about the order of sums. On a CPU oneDNN computes float32
without unfolding; the other kernels are faster there for kernels of one entry, for input VJPs with
few channels and a stride, and for weight VJPs of large depthwise kernels.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import padded

ALWAYS_FASTER = ("cuda",)
"""Types of devices whose library is faster than the other kernels for all sizes."""

FEW_CHANNELS = 4
"""Channels of the input up to which input VJPs with a stride are faster by other kernels."""

LARGE_DEPTHWISE_ENTRIES = 25
"""Entries of a depthwise kernel above which weight VJPs are faster by the other kernels."""

MOST_AXES = 3
"""Number of axes of the library's largest convolution."""

convolution: Any = torch.ops.aten.convolution
convolution_backward: Any = torch.ops.aten.convolution_backward


def applies(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> bool:
    """Return whether the library computes a contraction, and faster than the other kernels.

    Args:
        geometry: The convolution.
        role: The tensor that is contracted, as in `contract_convolution`.
        first: The first of the others.
        second: The second of the others.
    """
    if not (first.is_floating_point() and 1 <= geometry.ndim <= MOST_AXES):
        return False
    return first.device.type in ALWAYS_FASTER or _is_faster_on_host(geometry, role, first, second)


def _is_faster_on_host(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> bool:
    """Return whether oneDNN computes a contraction on the host, faster than the other kernels."""
    mkldnn = torch.backends.mkldnn
    by_onednn = first.device.type == "cpu" and first.dtype == second.dtype == torch.float32
    entries = prod(geometry.kernel_size)
    if not (by_onednn and entries > 1 and mkldnn.enabled and _has_onednn()):
        return False
    if role == "x":
        strided = any(axis.stride > 1 for axis in geometry.axes)
        return geometry.groups * first.shape[1] > FEW_CHANNELS or not strided
    depthwise = role == "w" and first.shape[1] == geometry.groups > 1
    return not depthwise or entries <= LARGE_DEPTHWISE_ENTRIES


@cache
def _has_onednn() -> bool:
    """Return whether torch was built with oneDNN."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, (g co), *o]``."""
    result: Tensor = convolution(_padded(geometry, x), weight, None, *_options(geometry))
    return result


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, (g ci), *i]``."""
    x = _like(v, (v.shape[0], geometry.groups * weight.shape[1], *_input_size(geometry)))
    result: Tensor = _backward(geometry, v, x, weight, (True, False, False))[0]
    if _is_even(geometry):
        return result
    return padded(result, [(-left, -right) for left, right in geometry.exact_padding])


def recorded_input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return `input_vjp` as a transposed convolution, whose derivatives torch records."""
    stride, padding, dilation, _, _, groups = _options(geometry)
    sizes = zip(_input_size(geometry), geometry.axes, padding)
    extra = [size + 2 * left - axis.covered_size for size, axis, left in sizes]
    options = (stride, padding, dilation, True, extra, groups)
    result: Tensor = convolution(v, weight, None, *options)
    if _is_even(geometry):
        return result
    return padded(result, [(-left, -right) for left, right in geometry.exact_padding])


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [(g co), ci, *k]``."""
    channels = x.shape[1] // geometry.groups
    weight = _like(v, (v.shape[1], channels, *geometry.kernel_size))
    result: Tensor = _backward(geometry, v, _padded(geometry, x), weight, (False, True, False))[1]
    return result


def _backward(
    geometry: Geometry, v: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
) -> Any:
    """Return the gradients of input, kernel and bias that are wanted."""
    return convolution_backward(v, x, weight, None, *_options(geometry), wanted)


def _like(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of which only the shape is read; it takes no memory."""
    return v.new_empty(1).expand(shape)


def _is_even(geometry: Geometry) -> bool:
    """Return whether the padding is equal on both sides, as the library's is."""
    return all(axis.padding[0] == axis.padding[1] for axis in geometry.axes)


def _padded(geometry: Geometry, x: Tensor) -> Tensor:
    """Return the input, padded if the library cannot."""
    return x if _is_even(geometry) else padded(x, geometry.exact_padding)


def _input_size(geometry: Geometry) -> tuple[int, ...]:
    """Return the size of `_padded`."""
    if _is_even(geometry):
        return geometry.input_size
    return tuple(axis.covered_size for axis in geometry.axes)


def _options(geometry: Geometry) -> tuple[Any, ...]:
    """Return the hyper-parameters in the library's order, from the stride to the groups."""
    even, zeros = _is_even(geometry), [0] * geometry.ndim
    padding = [axis.padding[0] for axis in geometry.axes] if even else zeros
    return geometry.stride, padding, geometry.dilation, False, zeros, geometry.groups
