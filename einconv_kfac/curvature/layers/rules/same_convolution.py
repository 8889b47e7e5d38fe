"""Convolutions of timm whose padding depends on the size of the input, as in TensorFlow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.rules.convolution import ConvRule


class _Conv2dSame(nn.Conv2d):
    """The layer, for the examples."""

    __module__, __qualname__ = "timm.layers.conv2d_same", "Conv2dSame"

    def forward(self, x: Tensor) -> Tensor:
        x, _ = SameConvRule().padded(self, x)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class SameConvRule(ConvRule):
    """The output has the size of the input, divided by the stride and rounded up."""

    kinds = ("timm.layers.conv2d_same.Conv2dSame",)
    examples = (LayerExample(lambda: _Conv2dSame(4, 6, 3, 2, groups=2), (3, 4, 6, 5)),)

    def padded(self, module: Any, x: Tensor) -> tuple[Tensor, Any]:
        """See `ConvRule`; of an odd number of zeros, the larger half is at the end."""
        amounts: list[int] = []
        options = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation)
        for size, kernel, stride, dilation in options:
            total = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size
            total = max(total, 0)
            amounts = [total // 2, total - total // 2, *amounts]
        return functional.pad(x, amounts), 0
