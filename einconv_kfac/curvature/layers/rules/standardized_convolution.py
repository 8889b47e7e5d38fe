"""Convolutions of timm that standardize their weight in the forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from einconv_kfac.curvature.layers.computed.standardization import KINDS
from einconv_kfac.curvature.layers.rules.convolution import ConvRule
from einconv_kfac.curvature.layers.rules.same_convolution import SameConvRule


class StandardizedConvRule(ConvRule):
    """Convolutions with the standardized weight.

    The output is not linear in the parameter. Its Gauss-Newton block is ``J^T (B (x) A) J`` with
    the Jacobian ``J`` of the standardisation, and no Kronecker product.
    """

    kinds = KINDS
    examples = ()

    def refusal(self, module: Any) -> str | None:
        """See `LayerRule`; it does not hold where the weight may be computed from parameters."""
        return "its weight is standardized in the forward pass: the block is no Kronecker product"

    def padded(self, module: Any, x: Tensor) -> tuple[Tensor, Any]:
        """See `ConvRule`; some pad as TensorFlow does."""
        if getattr(module, "same_pad", False):
            return SameConvRule().padded(module, x)
        return super().padded(module, x)
