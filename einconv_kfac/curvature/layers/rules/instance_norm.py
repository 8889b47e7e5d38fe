"""Scale and shift of instance norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import ChannelNormRule

_BATCH_DIMENSIONS = ((nn.InstanceNorm1d, 3), (nn.InstanceNorm2d, 4), (nn.InstanceNorm3d, 5))
"""The number of dimensions of a batch, by type."""


class InstanceNormRule(ChannelNormRule):
    """Normalised per example or, in evaluation, by running statistics if there are any."""

    kinds = (_InstanceNorm,)
    examples = (
        LayerExample(lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 2)),
        LayerExample(
            lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), (3, 4, 3)
        ),
    )

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        if not module.training and module.running_mean is not None:
            statistics = module.running_mean, module.running_var
            return functional.batch_norm(x, *statistics, eps=module.eps)
        return functional.instance_norm(x, eps=module.eps)

    def accepts(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`; torch's types also accept single examples, of a dimension less."""
        least = next((n for kind, n in _BATCH_DIMENSIONS if isinstance(module, kind)), 2)
        return x.ndim >= least
