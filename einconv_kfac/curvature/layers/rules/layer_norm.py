"""Scale and shift of layer norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import TrailingNormRule


class LayerNormRule(TrailingNormRule):
    """Normalised per example and position, over the last dimensions."""

    kinds = (nn.LayerNorm, "timm.layers.norm.LayerNorm")
    examples = (
        LayerExample(lambda: nn.LayerNorm(4), (3, 2, 4)),
        LayerExample(lambda: nn.LayerNorm([2, 3]), (4, 2, 3)),
    )

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        return functional.layer_norm(x, list(module.normalized_shape), eps=module.eps)
