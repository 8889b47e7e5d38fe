"""A convolution's contractions as one opaque operator, for graphs that torch traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels import dense, depthwise, innermost, stacked
from einconv_kfac.geometry import Axis, Geometry

ROLES = ("x", "w", "v")
"""Input, kernel, and a vector like the output."""

Operation: TypeAlias = Callable[[Geometry, Tensor, Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "v": dense.forward,
    "x": dense.input_vjp,
    "w": dense.weight_vjp,
}
DEPTHWISE: dict[str, Operation] = {
    "v": depthwise.forward,
    "x": depthwise.input_vjp,
    "w": depthwise.weight_vjp,
}
INNERMOST: dict[str, Operation] = {
    "v": innermost.forward,
    "x": innermost.input_vjp,
    "w": innermost.weight_vjp,
}
STACKED: dict[str, Operation] = {
    "v": stacked.forward,
    "x": stacked.input_vjp,
    "w": stacked.weight_vjp,
}


MANY = 32
"""Channels from which on they are moved innermost."""


def others(role: str) -> tuple[str, str]:
    """Return the two other roles, in order."""
    first, second = (other for other in ROLES if other != role)
    return first, second


def contract(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Contract two tensors of a convolution to the third, without a derivative."""
    return operation(geometry, role, first, second)(
        geometry, first.contiguous(), second.contiguous()
    )


def operation(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Operation:
    """Choose in which order to contract, from the sizes."""
    groups = geometry.groups
    if geometry.ndim > stacked.LAST:
        return STACKED[role]
    if groups == 1 or first.element_size() < 4:
        return OPERATIONS[role]
    weight = {"v": second, "x": first}.get(role)
    single = first.shape[1] == groups if weight is None else weight.shape[1] == 1
    outputs = second.shape[1] if weight is None else weight.shape[0]
    if not single or (outputs != groups and role != "v"):
        return OPERATIONS[role]
    small = outputs == groups and groups >= MANY and innermost.pays(geometry)
    return (INNERMOST if small else DEPTHWISE)[role]


@torch.library.custom_op(
    "einconv_kfac::convolution",
    mutates_args=(),
    schema="(str role, SymInt[] sizes, Tensor first, Tensor second) -> Tensor",
)
def convolution(role: str, sizes: list[int], first: Tensor, second: Tensor) -> Tensor:
    """Contract two tensors of a convolution to the third; see `trilinear.convolution`."""
    return contract(_geometry(tuple(sizes)), role, first, second)


@convolution.register_fake
def _(role: str, sizes: list[int], first: Tensor, second: Tensor) -> Tensor:
    geometry = _unflattened(sizes)
    if role == "v":
        return first.new_empty(first.shape[0], second.shape[0], *geometry.output_size)
    if role == "x":
        channels = geometry.groups * first.shape[1]
        return second.new_empty(second.shape[0], channels, *geometry.input_size)
    channels = first.shape[1] // geometry.groups
    return first.new_empty(second.shape[1], channels, *geometry.kernel_size)


def flattened(geometry: Geometry) -> list[int]:
    """Return a geometry as numbers: the groups, then six per axis."""
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


_geometry = lru_cache(maxsize=1024)(_unflattened)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the operands for the backward pass."""
    ctx.role, ctx.sizes, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Contract the gradient, in the result's role, with the other operand."""
    gradients: list[Tensor | None] = []
    roles = others(ctx.role)
    for needed, wanted in zip(ctx.needs_input_grad[2:], roles):
        tensors = dict(zip(roles, ctx.saved_tensors)) | {ctx.role: gradient}
        first, second = others(wanted)
        result = convolution(wanted, ctx.sizes, tensors[first], tensors[second]) if needed else None
        gradients.append(result)
    return (None, None, *gradients)


convolution.register_autograd(_backward, setup_context=_setup_context)
