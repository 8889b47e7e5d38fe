"""Convolutions of timm that standardize their weight in the forward pass."""

from __future__ import annotations

from typing import Any

from einconv_kfac.curvature.layers.rules.convolution import ConvRule


class StandardizedConvRule(ConvRule):
    """No block: the output is not linear in the parameter.

    The Gauss-Newton block of the parameter is ``J^T (B (x) A) J`` with the Jacobian ``J`` of the
    standardization, which depends on the weight, and is no Kronecker product.
    """

    kinds = tuple(
        f"timm.layers.std_conv.{name}"
        for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    )
    examples = ()

    def refusal(self, module: Any) -> str | None:
        """See `LayerRule`."""
        return "its weight is standardized in the forward pass: the block is no Kronecker product"
