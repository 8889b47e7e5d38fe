"""Transposed convolutions in any dimension, whose output positions share the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from einconv_kfac.curvature import factors
from einconv_kfac.curvature.factors.unfold import unfolded
from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.rules.convolution import ConvRule
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.padding import pad_input


class TransposedConvRule(ConvRule):
    """Outputs ``[n, (g co), *s]``; ``a`` is a column of the transposed unfolded input."""

    kinds = (_ConvTransposeNd,)
    examples = (
        LayerExample(lambda: nn.ConvTranspose2d(4, 6, (2, 3), 2, (0, 1), groups=2), (3, 4, 3, 2)),
        LayerExample(lambda: nn.ConvTranspose1d(2, 3, 4, 3, dilation=2), (3, 2, 4)),
    )

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
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

    def products(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> int:
        """See `LayerRule`; each position of the input is multiplied once."""
        return prod(x.shape[2:])

    def factor_of(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Callable[..., Tensor]:
        """See `ConvRule`."""
        return partial(
            factors.conv_transpose_input_factor,
            x,
            module.kernel_size,
            module.stride,
            module.padding,
            _output_padding(module, x, y_shape),
            module.dilation,
            module.groups,
        )


def _output_padding(module: _ConvTransposeNd, x: Tensor, y_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the output padding of a call, from the sizes of its input and its output."""
    sides = zip(
        y_shape[2:], x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size
    )
    return tuple(y - ((o - 1) * s - 2 * int(p) + d * (k - 1) + 1) for y, o, s, p, d, k in sides)
