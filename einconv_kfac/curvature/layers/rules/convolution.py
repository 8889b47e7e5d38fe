"""Convolutions in any dimension, whose output positions share the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from einconv_kfac.curvature import factors
from einconv_kfac.curvature.factors.approximation import Approximation, updated
from einconv_kfac.curvature.factors.unfold import unfolded
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule
from einconv_kfac.curvature.type_registry import Kind
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.padding import pad_input

_UNFOLDED_ENTRIES = 1 << 24
"""Number of entries of unfolded inputs that are held at a time, at most about."""


class ConvRule(LayerRule):
    """Outputs ``[n, (g co), *s]``; ``a`` is a column of the unfolded, padded input."""

    kinds: ClassVar[tuple[Kind, ...]] = (_ConvNd,)
    may_compute_weight = True
    examples: ClassVar[tuple[LayerExample, ...]] = (
        LayerExample(lambda: nn.Conv2d(4, 6, (3, 2), 2, (1, 0), 2, 2), (3, 4, 6, 5)),
        LayerExample(lambda: nn.Conv1d(4, 2, 3, padding=2, padding_mode="circular"), (3, 4, 5)),
    )

    def split(self, module: _ConvNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        shape = module.weight.shape
        return (module.groups, shape[0] // module.groups, *shape[1:]), tuple(
            range(1 + module.weight.ndim)
        )

    def inputs(self, module: _ConvNd, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        x, padding = self.padded(module, x)
        geometry = conv_geometry(
            x.shape[2:], module.kernel_size, module.stride, padding, module.dilation, module.groups
        )
        columns = unfolded(x, geometry)  # g (ci k) (n o)
        return torch.unflatten(columns, 2, (x.shape[0], -1)).permute(2, 0, 1, 3)

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim == len(module.kernel_size) + 2

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return torch.unflatten(gradient.flatten(2), 1, (module.groups, -1))

    def may_join(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`; a rule with inputs of its own says it itself."""
        return type(self).inputs is ConvRule.inputs

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """See `LayerRule`."""
        return prod(y_shape[2:])

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
        return self.factor_of(module, x, y_shape)(approximation, bias, **into)

    def factor_of(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Callable[..., Tensor]:
        """Return the function of approximation and bias that returns ``A`` for a call."""
        x, padding = self.padded(module, x)
        hyper = (module.kernel_size, module.stride, padding, module.dilation, module.groups)
        return partial(factors.conv_input_factor, x, *hyper)

    def input_diagonal(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`; inputs are unfolded a few examples at a time."""
        entries = self.positions(module, y_shape) * _weight_entries(module)
        parts = [
            super(ConvRule, self).input_diagonal(
                module, part, (len(part), *y_shape[1:]), approximation, bias, alpha=len(part)
            )
            for part in torch.split(x, max(1, _UNFOLDED_ENTRIES // max(entries, 1)))
        ]
        total = torch.stack(parts).sum(0).div_(len(x))
        return updated(total, **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        return factors.conv_output_factor(
            gradient.unsqueeze(0), module.groups, approximation, **into
        )

    def padded(self, module: Any, x: Tensor) -> tuple[Tensor, Any]:
        """Return an input with the module's padding mode applied, and the padding that remains."""
        if module.padding_mode == "zeros":
            return x, module.padding
        padding: Any = module.padding
        geometry = conv_geometry(
            x.shape[2:], module.kernel_size, module.stride, padding, module.dilation
        )
        return pad_input(x, geometry.padding, module.padding_mode), 0


def _weight_entries(module: Any) -> int:
    """Return the number of entries of the weight, which may be costly to compute."""
    sides = module.in_channels, module.out_channels, *module.kernel_size
    return int(prod(sides) // module.groups)
