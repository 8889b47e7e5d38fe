"""Scale and shift of batch norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import ChannelNormRule


class BatchNormRule(ChannelNormRule):
    """Normalised by the statistics of the batch or, in evaluation, by the running ones."""

    kinds = (_BatchNorm,)
    examples = (
        LayerExample(lambda: nn.BatchNorm1d(4), (5, 4)),
        LayerExample(lambda: nn.BatchNorm2d(4).eval(), (5, 4, 3, 2)),
    )

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        if not module.training and module.running_mean is not None:
            statistics = module.running_mean, module.running_var
            return functional.batch_norm(x, *statistics, eps=module.eps)
        return functional.batch_norm(x, None, None, training=True, eps=module.eps)
