"""The contractions of a convolution as one opaque operator, for graphs that torch traces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.evaluate.autocast import contract_as_given
from einconv_kfac.evaluate.kernels.selection import others, result_shape
from einconv_kfac.evaluate.layouts import has_channels_last, layout
from einconv_kfac.geometry import Axis, Geometry


@torch.library.custom_op(
    "einconv_kfac::convolution",
    mutates_args=(),
    schema="(str role, SymInt[] sizes, bool last, Tensor first, Tensor second) -> Tensor",
)
def convolution(role: str, sizes: list[int], last: bool, first: Tensor, second: Tensor) -> Tensor:
    """Contract two tensors of a convolution to the third, with its channels last or not.

    The layout is an argument: a compiler may give the tensors other layouts than it traced.
    """
    result = contract_as_given(_cached_unflattened(tuple(sizes)), role, first, second)
    return result.contiguous(memory_format=layout(result.ndim, last))


@convolution.register_fake
def _(role: str, sizes: list[int], last: bool, first: Tensor, second: Tensor) -> Tensor:
    result = first.new_empty(result_shape(_unflattened(sizes), role, first, second))
    return result.contiguous(memory_format=layout(result.ndim, last))


def traced_convolution(role: str, sizes: list[int], first: Tensor, second: Tensor) -> Tensor:
    """Contract two tensors of a convolution to the third; see `contract_convolution`."""
    result: Tensor = convolution(role, sizes, has_channels_last(first, second), first, second)
    return result


def conjugate(tensor: Tensor) -> Tensor:
    """Return the complex conjugate, as a view; a real tensor itself."""
    return tensor.conj() if tensor.is_complex() else tensor


def flattened(geometry: Geometry) -> list[int]:
    """Return a geometry as numbers: the groups, then six numbers per axis."""
    numbers = [geometry.groups]
    for axis in geometry.axes:
        numbers += [axis.input_size, axis.kernel_size, axis.stride, *axis.padding, axis.dilation]
    return numbers


def _unflattened(sizes: Sequence[int]) -> Geometry:
    """Return the geometry from its numbers."""
    axes = (sizes[at : at + 6] for at in range(1, len(sizes), 6))
    return Geometry(
        tuple(Axis(i, k, s, (left, right), d) for i, k, s, left, right, d in axes), sizes[0]
    )


_cached_unflattened = lru_cache(maxsize=1024)(_unflattened)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the operands for the backward pass."""
    ctx.role, ctx.sizes, _, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Contract the gradient, in the result's role, with the other operand."""
    gradients: list[Tensor | None] = []
    roles = others(ctx.role)
    others_of_result = [conjugate(tensor) for tensor in ctx.saved_tensors]
    for needed, role in zip(ctx.needs_input_grad[3:], roles):
        tensors = dict(zip(roles, others_of_result)) | {ctx.role: gradient}
        first, second = others(role)
        operands = tensors[first], tensors[second]
        gradients.append(traced_convolution(role, ctx.sizes, *operands) if needed else None)
    return (None, None, None, *gradients)


convolution.register_autograd(_backward, setup_context=_setup_context)
