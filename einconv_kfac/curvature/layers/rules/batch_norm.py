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
    row_dim = 2  # all rows are normalised together
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
        """See `LayerRule`; with "expand", nothing is normalised by statistics of the batch.

        The mean of the normalised inputs is zero, and that of their squares ``var / (var + eps)``.
        """
        uses_batch = module.training or module.running_mean is None
        if approximation != "expand" or not uses_batch:
            return super().input_factor(module, x, y_shape, approximation, bias, **into)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1)  # n c s
        examples, _, positions = x.shape
        count = examples * positions
        center = x.sum(2).sum(0) / count
        norms: Tensor = torch.linalg.vector_norm(x - center[:, None], dim=2)
        squares = norms.square().sum(0)
        share = squares / (squares + count * module.eps)
        sums = torch.zeros_like(share) if bias else None
        return updated(moment_matrices(share * positions, sums, positions), **into)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        if not module.training and module.running_mean is not None:
            statistics = module.running_mean, module.running_var
            return functional.batch_norm(x, *statistics, eps=module.eps)
        return functional.batch_norm(x, None, None, training=True, eps=module.eps)
