"""Scale and shift of normalisation layers: one channel group per channel, ``y = w a + b``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.approximation import Approximation, updated, weight_sharing
from einconv_kfac.curvature.layers.layer_rule import LayerRule


class ScaleRule(LayerRule):
    """A weight and a bias per channel: ``g = c`` groups of one input and one output each."""

    @abstractmethod
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """Return the input as the module normalises it, and leave its statistics alone."""

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return self.outputs(module, self.normalized(module, x))

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (module.weight.numel(), 1, 1), (0, 1, 2)

    def input_factor(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`; sums per channel are faster than products of thin matrices."""
        a = self.inputs(module, x, y_shape)  # n c 1 s
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        a = weight_sharing(approximation).inputs(a)
        examples, positions = a.shape[0], a.shape[-1]
        sums = a.sum((0, 2, 3)) / examples if bias else None
        return updated(moment_matrices(_squares(a) / examples, sums, positions), **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        g = self.outputs(module, gradient)  # n c 1 s
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        g = weight_sharing(approximation).gradients(g)
        return updated(_squares(g)[:, None, None] / (g.shape[0] * g.shape[-1]), **into)


def moment_matrices(squares: Tensor, sums: Tensor | None, positions: int) -> Tensor:
    """Return the second moments of ``[a, 1]`` per channel, averaged over examples, ``[c, 2, 2]``.

    Args:
        squares: Sum of the squares of ``a`` over positions, averaged over examples, ``[c]``.
        sums: Sum of ``a``, likewise; for ``None`` the moments ``[c, 1, 1]`` of ``a`` alone.
        positions: Number of positions of each example.
    """
    if sums is None:
        return squares[:, None, None]
    ones = torch.full_like(sums, positions)
    return torch.stack([squares, sums, sums, ones], -1).reshape(-1, 2, 2)


class ChannelNormRule(ScaleRule):
    """Inputs and outputs ``[n, c, *s]``."""

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient.reshape(*gradient.shape[:2], 1, -1)


class TrailingNormRule(ScaleRule):
    """Inputs and outputs ``[n, *s, *c]``."""

    row_dim = 1

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """See `LayerRule`."""
        return prod(y_shape[1:]) // prod(self.shape(module))

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        channels = prod(self.shape(module))
        return gradient.reshape(gradient.shape[0], -1, channels).mT.unsqueeze(2)

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim > len(self.shape(module))

    def shape(self, module: Any) -> tuple[int, ...]:
        """Return the shape ``[*c]`` of the weight."""
        return tuple(module.normalized_shape)


def _squares(a: Tensor) -> Tensor:
    """Return the sum of squares per channel of ``a [n, c, 1, s]``, ``[c]``."""
    norms: Tensor = torch.linalg.vector_norm(a, dim=(0, 2, 3))
    return norms.square()
