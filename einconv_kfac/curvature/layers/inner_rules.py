"""Rules for layers with a forward pass of their own, by the functions of torch that it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.inner_calls import ALWAYS, REPLACEMENTS, has_weight
from einconv_kfac.curvature.layers.interception import intercepted
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule, Record
from einconv_kfac.curvature.layers.rules.convolution import ConvRule
from einconv_kfac.curvature.layers.rules.linear import LinearRule

NO_BIAS = "no bias"
"""Stands for the name of a bias, where the function gets none, or one that is computed."""


class _InnerRule(LayerRule):
    """A layer whose calls are those of a function of torch, with its weight times a constant."""

    sees_inner_calls = True
    kinds: ClassVar[tuple[Any, ...]] = ()
    examples: ClassVar[tuple[LayerExample, ...]] = ()

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        own = [
            intercepted(module, self.weight, each, REPLACEMENTS, has_weight)
            for each in (record, ALWAYS)
        ]

        def undo() -> None:
            for each in own:
                each()

        return undo


@dataclass(frozen=True)
class InnerLinearRule(_InnerRule, LinearRule):
    """The calls of ``functional.linear`` in a module.

    Args:
        bias: Name of the bias in the module, or `NO_BIAS`.
    """

    bias: str = NO_BIAS


@dataclass(frozen=True)
class InnerConvRule(_InnerRule, ConvRule):
    """The calls of a convolution in a module, whose own options do not count.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Sizes of the kernel.
        stride: Strides.
        padding: Numbers of zeros on either side, or a word for them.
        dilation: Dilations.
        groups: Number of channel groups.
        bias: Name of the bias in the module, or `NO_BIAS`.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    bias: str = NO_BIAS
    padding_mode = "zeros"

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        shape = module.weight.shape
        return (self.groups, shape[0] // self.groups, *shape[1:]), tuple(range(1 + len(shape)))

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        own: Any = self
        return super().inputs(own, x, y_shape)

    def may_join(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return True

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return super().accepts(self, x)

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return super().outputs(self, gradient)

    def factor_of(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Callable[..., Tensor]:
        """See `ConvRule`."""
        return super().factor_of(self, x, y_shape)

    def input_diagonal(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        return super().input_diagonal(self, x, y_shape, approximation, bias, **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        return super().output_factor(self, gradient, approximation, **into)
