"""Ways to compute the input-based Kronecker factor of a layer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from factor_layers import Layer
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.factors import conv_input_factor, conv_transpose_input_factor

OURS = "ours"
NAMES = (OURS, "einconv", "curvlinops", "backpack", "im2col")


def ours(layer: Layer, approximation: str, algorithm: str | None = None) -> Callable[[Tensor], Any]:
    """Return the call of this package."""
    function = conv_transpose_input_factor if layer.transposed else conv_input_factor
    choice = {"approximation": approximation, "algorithm": algorithm}
    options: dict[str, Any] = {**layer.options, **choice}
    return lambda x: function(x, **options)


def unfolded(x: Tensor, layer: Layer) -> Tensor:
    """Return ``[n, (c k), s]``, by torch where it has an unfold."""
    geometry, axes = layer.geometry, layer.geometry.axes
    if layer.transposed:  # a convolution of the input with zeros between
        sizes = [(size - 1) * axis.stride + 1 for size, axis in zip(x.shape[2:], axes)]
        spaced: tuple[Any, ...] = (..., *(slice(None, None, axis.stride) for axis in axes))
        wide = x.new_zeros(*x.shape[:2], *sizes)
        wide[spaced] = x
        sides = [axis.span - 1 - side for axis in reversed(axes) for side in axis.padding]
        wide = functional.pad(wide, sides)
        a = functional.unfold(wide, geometry.kernel_size, geometry.dilation)
        entries = torch.unflatten(a, 1, (x.shape[1], *geometry.kernel_size))
        return entries.flip(2, 3).reshape(a.shape)
    x = functional.pad(x, [side for axis in reversed(axes) for side in axis.padding])
    if geometry.ndim == 2:
        return functional.unfold(x, geometry.kernel_size, geometry.dilation, 0, geometry.stride)
    for dim, axis in enumerate(axes, start=2):
        x = x.unfold(dim, axis.span, axis.stride)
    d = geometry.ndim
    dilated: tuple[Any, ...] = (..., *(slice(None, None, axis.dilation) for axis in axes))
    x = x[dilated].permute(0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))
    return x.reshape(x.shape[0], -1, geometry.positions)


def im2col(layer: Layer, approximation: str) -> Callable[[Tensor], Any]:
    """Return unfold and one matrix product."""

    def call(x: Tensor) -> Tensor:
        a = unfolded(x, layer)
        a = a.mean(2, keepdim=True) if approximation == "reduce" else a
        a = torch.unflatten(a, 1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        result: Tensor = a @ a.mT / x.shape[0]
        return result

    return call


def einconv(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return einconv 0.1.0's expression, built and evaluated."""
    if layer.transposed or find_spec("einconv") is None:
        return None
    name = "convNd_kfc" if approximation == "expand" else "convNd_kfac_reduce"
    module: Any = import_module(f"einconv.expressions.{name}")

    def call(x: Tensor) -> Tensor:
        equation, operands, shape = module.einsum_expression(x, **layer.options)
        return torch.einsum(equation, *operands).reshape(shape)

    return call


def curvlinops(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return the way of curvlinops, which has no factors per group."""
    unknown = layer.transposed or layer.groups > 1 or layer.geometry.ndim != 2
    if unknown or find_spec("curvlinops") is None:
        return None
    ways: Any = import_module("curvlinops.kfac_utils")
    extract = ways.extract_patches if approximation == "expand" else ways.extract_averaged_patches
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    arguments = [layer.options[name] for name in names]

    def call(x: Tensor) -> Tensor:
        a = extract(x, *arguments).reshape(-1, layer.problem.size)
        return torch.einsum("bi,bj->ij", a, a).div_(x.shape[0])

    return call


def backpack(layer: Layer, approximation: str) -> Callable[[Tensor], Any] | None:
    """Return the way of BackPACK, which has expand only and no groups."""
    if approximation == "reduce" or layer.groups > 1:
        return None

    def call(x: Tensor) -> Tensor:
        a = unfolded(x, layer)
        return torch.einsum("bik,bjk->ij", a, a) / x.shape[0]

    return call


CONTESTANTS = {OURS: ours, "einconv": einconv, "curvlinops": curvlinops, "backpack": backpack,
               "im2col": im2col}  # fmt: skip
