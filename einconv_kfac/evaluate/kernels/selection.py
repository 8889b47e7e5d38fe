"""The kernel for a convolution, selected from its sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels import (
    dense,
    depthwise,
    innermost,
    library,
    stacked,
    wide,
    windows,
)
from einconv_kfac.geometry import Geometry

TENSOR_ROLES = ("x", "w", "v")
"""The tensors of a convolution: input, kernel, and a vector like the output."""

INNERMOST_MIN_CHANNELS = 32
"""Number of channels from which on moving them innermost is faster."""

Contraction: TypeAlias = Callable[[Geometry, Tensor, Tensor], Tensor]


class Kernel(Protocol):
    """The three contractions of a convolution, as the functions of a kernel's file.

    Operands are contiguous and in the order of `TENSOR_ROLES`. Shapes are ``[n, (g ci), *i]`` for
    ``x``, ``[(g co), ci, *k]`` for ``weight`` and ``[n, (g co), *o]`` for ``v``.
    """

    def forward(self, geometry: Geometry, x: Tensor, weight: Tensor, /) -> Tensor:
        """Return ``x P W``, of shape ``[n, (g co), *o]``."""

    def input_vjp(self, geometry: Geometry, weight: Tensor, v: Tensor, /) -> Tensor:
        """Return ``W P v``, of shape ``[n, (g ci), *i]``."""

    def weight_vjp(self, geometry: Geometry, x: Tensor, v: Tensor, /) -> Tensor:
        """Return ``x P v``, of shape ``[(g co), ci, *k]``."""


def by_role(kernel: Kernel) -> dict[str, Contraction]:
    """Return a kernel's contractions by the role of their result."""
    return {"v": kernel.forward, "x": kernel.input_vjp, "w": kernel.weight_vjp}


DENSE, DEPTHWISE, INNERMOST, STACKED = map(by_role, (dense, depthwise, innermost, stacked))
LIBRARY, WIDE = map(by_role, (library, wide))
RECORDED = {**LIBRARY, "x": library.recorded_input_vjp}
"""Contractions by operations of torch whose derivatives of every order can be recorded."""


def others(role: str) -> tuple[str, str]:
    """Return the two other roles, in order."""
    first, second = (other for other in TENSOR_ROLES if other != role)
    return first, second


def result_shape(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> tuple[int, ...]:
    """Return the shape of the tensor contracted from two others."""
    if role == "v":
        return first.shape[0], second.shape[0], *geometry.output_size
    if role == "x":
        return second.shape[0], geometry.groups * first.shape[1], *geometry.input_size
    return second.shape[1], first.shape[1] // geometry.groups, *geometry.kernel_size


def contract(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Contract two tensors of a convolution to the third, without derivatives.

    The kernels have no case for tensors without entries, of which the result is zero.
    """
    if 0 in (first.numel(), second.numel()):
        return first.new_zeros(result_shape(geometry, role, first, second))
    if windows.is_wide(geometry):
        return WIDE[role](geometry, first, second)
    if library.applies(geometry, role, first, second):
        return LIBRARY[role](geometry, first, second)  # operands of any layout
    return contraction(geometry, role, first, second)(
        geometry, first.contiguous(), second.contiguous()
    )


def contract_by_torch(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Contract as `contract`, by operations of torch that it can differentiate and map.

    Of complex tensors, for which torch lacks some of them, the real parts are contracted.
    """
    kernel = (RECORDED if geometry.ndim <= library.MOST_AXES else STACKED)[role]
    if not first.is_complex():
        return kernel(geometry, first, second)
    a, b, c, d = first.real, first.imag, second.real, second.imag
    real = kernel(geometry, a, c) - kernel(geometry, b, d)
    return torch.complex(real, kernel(geometry, a, d) + kernel(geometry, b, c))


def contraction(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Contraction:
    """Return the fastest contraction for the sizes."""
    groups = geometry.groups
    if geometry.ndim > stacked.TORCH_AXES and first.is_floating_point():
        return STACKED[role]
    if groups == 1 or first.element_size() < 4:
        return DENSE[role]
    weight = {"v": second, "x": first}.get(role)
    single = first.shape[1] == groups if weight is None else weight.shape[1] == 1
    outputs = second.shape[1] if weight is None else weight.shape[0]
    if not single or (outputs != groups and role != "v"):
        return DENSE[role]
    small = outputs == groups and groups >= INNERMOST_MIN_CHANNELS and innermost.pays(geometry)
    return (INNERMOST if small else DEPTHWISE)[role]
