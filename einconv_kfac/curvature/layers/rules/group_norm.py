"""Scale and shift of group norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import ChannelNormRule


class GroupNormRule(ChannelNormRule):
    """Normalised per example and group of channels."""

    kinds = (nn.GroupNorm,)
    examples = (LayerExample(lambda: nn.GroupNorm(2, 4), (3, 4, 3)),)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        return functional.group_norm(x, module.num_groups, eps=module.eps)
