"""Scale and shift of normalisation layers: one channel group per channel, ``y = w a + b``."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from einconv_kfac.curvature.layers.rules.rule import Approximation, LayerRule

_INSTANCE_NORMS = ((nn.InstanceNorm1d, 3), (nn.InstanceNorm2d, 4), (nn.InstanceNorm3d, 5))
"""Instance norms take single examples too; these are the dimensions of a batch."""


class _ScaleRule(LayerRule):
    """A weight and a bias per channel."""

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
        a = a.mean(-1, keepdim=True) if approximation == "reduce" else a
        squares = _squares(a)
        if not bias:
            return _added(squares[:, None, None] / a.shape[0], **into)
        sums = a.sum((0, 2, 3))
        ones = torch.full_like(sums, a.shape[0] * a.shape[-1])
        factor = torch.stack([squares, sums, sums, ones], -1).reshape(-1, 2, 2)
        return _added(factor.div_(a.shape[0]), **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """See `LayerRule`."""
        g = self.outputs(module, gradient)  # n c 1 s
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        g = g.sum(-1, keepdim=True) if approximation == "reduce" else g
        return _added(_squares(g)[:, None, None] / (g.shape[0] * g.shape[-1]), **into)


class ChannelNormRule(_ScaleRule):
    """Batch, instance and group norms: inputs and outputs ``[n, c, *s]``."""

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return self.outputs(module, _normalized(module, x))

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient.reshape(*gradient.shape[:2], 1, -1)

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        least = next((n for kind, n in _INSTANCE_NORMS if isinstance(module, kind)), 2)
        return x.ndim >= least


class TrailingNormRule(_ScaleRule):
    """Layer and root-mean-square norms: inputs and outputs ``[n, *s, *c]``."""

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        shape = list(module.normalized_shape)
        if isinstance(module, nn.LayerNorm):
            return self.outputs(module, functional.layer_norm(x, shape, eps=module.eps))
        return self.outputs(module, functional.rms_norm(x, shape, eps=module.eps))

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        channels = prod(module.normalized_shape)
        return gradient.reshape(gradient.shape[0], -1, channels).mT.unsqueeze(2)

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim > len(module.normalized_shape)


def _normalized(module: Any, x: Tensor) -> Tensor:
    """Return the input normalised as the module did, without touching its statistics."""
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if not module.training and module.running_mean is not None:
        return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    if isinstance(module, _InstanceNorm):
        return functional.instance_norm(x, eps=module.eps)
    return functional.batch_norm(x, None, None, training=True, eps=module.eps)


def _squares(a: Tensor) -> Tensor:
    """Return the sum of squares per channel of ``a [n, c, 1, s]``, ``[c]``."""
    norms: Tensor = torch.linalg.vector_norm(a, dim=(0, 2, 3))
    return norms.square()


def _added(
    factor: Tensor, *, out: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return ``beta * out + alpha * factor``, in place."""
    return factor.mul_(alpha) if out is None else out.mul_(beta).add_(factor, alpha=alpha)
