"""``torch.nn.Linear``; the dimensions between the first and the last are positions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from einconv_kfac.curvature import factors
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule
from einconv_kfac.curvature.type_registry import Kind


class LinearRule(LayerRule):
    """Inputs ``[n, *s, d]``, outputs ``[n, *s, co]``."""

    kinds: ClassVar[tuple[Kind, ...]] = (nn.Linear,)
    row_dim = 1
    may_compute_weight = True
    examples: ClassVar[tuple[LayerExample, ...]] = (
        LayerExample(lambda: nn.Linear(4, 3), (5, 4)),
        LayerExample(lambda: nn.Linear(4, 3, bias=False), (3, 2, 2, 4)),
    )

    def inputs(self, module: nn.Linear, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return x.reshape(x.shape[0], -1, x.shape[-1]).mT.unsqueeze(1)

    def outputs(self, module: nn.Linear, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]).mT.unsqueeze(1)

    def may_join(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`; a rule with inputs of its own says it itself."""
        return type(self).inputs is LinearRule.inputs

    def positions(self, module: nn.Linear, y_shape: Sequence[int]) -> int:
        """See `LayerRule`."""
        return prod(y_shape[1:-1])

    def input_factor(
        self,
        module: nn.Linear,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        return factors.linear_input_factor(x, approximation, bias, **into)

    def output_factor(
        self, module: nn.Linear, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        rows = gradient.reshape(1, gradient.shape[0], -1, gradient.shape[-1])
        return factors.output_factor(rows, 1, approximation, **into)
