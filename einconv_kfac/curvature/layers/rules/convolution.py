"""Convolutions and transposed ones in any dimension; output positions share the weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from einconv_kfac.curvature import factors
from einconv_kfac.curvature.factors.unfold import unfolded
from einconv_kfac.curvature.layers.rules.rule import Approximation, LayerRule
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.padding import pad_input


class _PositionsLast(LayerRule):
    """Outputs ``[n, (g co), *s]``."""

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim == len(module.kernel_size) + 2

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return torch.unflatten(gradient.flatten(2), 1, (module.groups, -1))

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """See `LayerRule`."""
        return prod(y_shape[2:])

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        return factors.conv_output_factor(
            gradient.unsqueeze(0), module.groups, approximation, **into
        )


class ConvRule(_PositionsLast):
    """Convolutions: ``a`` is a column of the unfolded, padded input."""

    def split(self, module: _ConvNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        shape = module.weight.shape
        return (module.groups, shape[0] // module.groups, *shape[1:]), tuple(
            range(1 + module.weight.ndim)
        )

    def inputs(self, module: _ConvNd, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        x, padding = _padded(module, x)
        geometry = conv_geometry(
            x.shape[2:], module.kernel_size, module.stride, padding, module.dilation, module.groups
        )
        columns = unfolded(x, geometry)  # g (ci k) (n o)
        return torch.unflatten(columns, 2, (x.shape[0], -1)).permute(2, 0, 1, 3)

    def input_factor(
        self,
        module: _ConvNd,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        x, padding = _padded(module, x)
        hyper = (module.kernel_size, module.stride, padding, module.dilation, module.groups)
        return factors.conv_input_factor(x, *hyper, approximation, bias, **into)


class TransposedConvRule(_PositionsLast):
    """Transposed convolutions: ``a`` is a column of the transposed unfolded input."""

    def split(self, module: _ConvTransposeNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        channels, outputs, *kernel = module.weight.shape
        groups = module.groups
        kernel_dims = range(3, 3 + len(kernel))
        return (groups, channels // groups, outputs, *kernel), (0, 2, 1, *kernel_dims)

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        stretched = x.new_zeros(
            *x.shape[:2], *((o - 1) * s + 1 for o, s in zip(x.shape[2:], module.stride))
        )
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
        stretched[every] = x
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        extra = _output_padding(module, x, y_shape)
        sides = [(m - int(p), m - int(p) + e) for m, p, e in zip(spans, module.padding, extra)]
        stretched = pad_input(stretched, sides)
        geometry = conv_geometry(
            stretched.shape[2:], module.kernel_size, 1, 0, module.dilation, module.groups
        )
        columns = unfolded(stretched, geometry)  # g (ci *k) (n s), the kernel reversed
        columns = torch.unflatten(columns, 1, (-1, *module.kernel_size))
        columns = columns.flip(*range(2, columns.ndim - 1)).flatten(1, -2)
        return torch.unflatten(columns, 2, (x.shape[0], -1)).permute(2, 0, 1, 3)

    def input_factor(
        self,
        module: _ConvTransposeNd,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        return factors.conv_transpose_input_factor(
            x,
            module.kernel_size,
            module.stride,
            module.padding,
            _output_padding(module, x, y_shape),
            module.dilation,
            module.groups,
            approximation,
            bias,
            **into,
        )


def _padded(module: _ConvNd, x: Tensor) -> tuple[Tensor, Any]:
    """Return an input with the module's padding mode applied, and the padding that remains."""
    if module.padding_mode == "zeros":
        return x, module.padding
    padding: Any = module.padding
    geometry = conv_geometry(
        x.shape[2:], module.kernel_size, module.stride, padding, module.dilation
    )
    return pad_input(x, geometry.padding, module.padding_mode), 0


def _output_padding(module: _ConvTransposeNd, x: Tensor, y_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the output padding that led to an output, whatever the call asked for."""
    sides = zip(
        y_shape[2:], x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size
    )
    return tuple(y - ((o - 1) * s - 2 * int(p) + d * (k - 1) + 1) for y, o, s, p, d, k in sides)
