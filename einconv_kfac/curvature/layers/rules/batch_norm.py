"""Scale and shift of batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from einconv_kfac.curvature.factors.approximation import Approximation, updated
from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import ChannelNormRule, moment_matrices


class BatchNormRule(ChannelNormRule):
    """Normalised by the statistics of the batch or, in evaluation, by the running ones."""

    kinds = (_BatchNorm,)
    examples = (
        LayerExample(lambda: nn.BatchNorm1d(4), (5, 4)),
        LayerExample(lambda: nn.BatchNorm2d(4).eval(), (5, 4, 3, 2)),
    )

    def input_factor(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`; with "expand" the sums of normalised inputs follow from those of inputs.

        In training the sum of the squares is ``N var / (var + eps)``, and the sum is zero.
        """
        if approximation != "expand":
            return super().input_factor(module, x, y_shape, approximation, bias, **into)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1)  # n c s
        examples, _, positions = x.shape
        total, count = x.sum(2).sum(0), examples * positions
        if module.training or module.running_mean is None:
            center, variance = total / count, None
        else:
            center, variance = module.running_mean.to(x), module.running_var.to(x)
        norms: Tensor = torch.linalg.vector_norm(x - center[:, None], dim=2)
        squares = norms.square().sum(0)
        scale = ((squares / count if variance is None else variance) + module.eps).reciprocal()
        sums = (total - count * center) * scale.sqrt() if bias else None
        factor = moment_matrices(squares * scale, sums, examples, positions)
        return updated(factor, **into)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        if not module.training and module.running_mean is not None:
            statistics = module.running_mean, module.running_var
            return functional.batch_norm(x, *statistics, eps=module.eps)
        return functional.batch_norm(x, None, None, training=True, eps=module.eps)
