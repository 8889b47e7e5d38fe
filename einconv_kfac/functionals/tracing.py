"""Convolutions that ``torch.jit.trace`` or ``torch.onnx.export`` records, by torch's functions."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.evaluate.recording import is_exported_to_onnx
from einconv_kfac.geometry import Padding, Sizes, parse_padding, per_dimension
from einconv_kfac.geometry.transposed import transposed_padding

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
REMEDY = "`torch.export.export` records it"


def records_torchs(weight: Tensor) -> bool:
    """Return whether torch's own function is recorded in place of ours.

    For ONNX it is if there is one of that dimension, and in ``torch.jit.trace`` always.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    return is_exported_to_onnx() and weight.ndim - 2 in _CONVOLUTIONS


def traced_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sizes, padding: Padding, dilation: Sizes, groups: int,
) -> Tensor:  # fmt: skip
    """Return `convNd` of the tensors.

    Raises:
        ValueError: If torch has no convolution of that dimension.
    """
    ndim = weight.ndim - 2
    convolve = _of_dimension(_CONVOLUTIONS, ndim)
    if not isinstance(padding, str):
        sides = parse_padding(padding, ndim)
        padding = tuple(left for left, _ in sides)
        if any(left != right for left, right in sides):
            x = functional.pad(x, list(chain(*reversed(sides))))
            padding = 0
    stride, dilation = (per_dimension(s, ndim, "stride") for s in (stride, dilation))
    result: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
    return result


def traced_conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sizes, padding: Padding, output_padding: Any, groups: int, dilation: Sizes,
) -> Tensor:  # fmt: skip
    """Return `conv_transposeNd` of the tensors.

    Raises:
        ValueError: If torch has no transposed convolution of that dimension.
    """
    ndim = weight.ndim - 2
    convolve = _of_dimension(_TRANSPOSED, ndim)
    sides = transposed_padding(padding, ndim)
    even = all(left == right for left, right in sides)
    removed = tuple(left for left, _ in sides) if even else 0
    stride, dilation = (per_dimension(s, ndim, "stride") for s in (stride, dilation))
    options = (stride, removed, output_padding, groups, dilation)
    result: Tensor = convolve(x, weight, bias, *options)
    if even:
        return result
    return result[(..., *(slice(left, -right or None) for left, right in sides))]


def refuse_trace(name: str) -> None:
    """Raise the error of a function of which a trace would hold for one input size alone."""
    raise ValueError(f"{name} cannot be recorded by `torch.jit.trace`; {REMEDY}.")


def _of_dimension(functions: dict[int, Any], ndim: int) -> Any:
    """Return torch's function for a number of spatial dimensions."""
    if ndim not in functions:
        raise ValueError(
            "`weight` must have one to three spatial dimensions while `torch.jit.trace` records, "
            f"got {ndim}; {REMEDY}."
        )
    return functions[ndim]
