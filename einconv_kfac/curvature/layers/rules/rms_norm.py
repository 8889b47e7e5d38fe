"""Scale of root-mean-square norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import TrailingNormRule


class RMSNormRule(TrailingNormRule):
    """Divided by the root mean square per example and position, over the last dimensions."""

    kinds = (nn.RMSNorm,)
    examples = (LayerExample(lambda: nn.RMSNorm(4), (3, 2, 4)),)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        return functional.rms_norm(x, list(module.normalized_shape), eps=module.eps)
