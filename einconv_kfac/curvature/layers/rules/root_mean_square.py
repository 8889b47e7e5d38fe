"""Root-mean-square norms of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.scale_rule import TrailingNormRule

CLASSES: Mapping[str, str] = {
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "mixtral": "MixtralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "phi3": "Phi3RMSNorm",
    "t5": "T5LayerNorm",
    "mt5": "MT5LayerNorm",
}
"""The classes by model; those of others, as Gemma's, compute something else."""


class _Norm(nn.Module):
    """The layer, for the examples."""

    __module__, __qualname__ = "transformers.models.llama.modeling_llama", "LlamaRMSNorm"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * RootMeanSquareRule().normalized(self, x)


class RootMeanSquareRule(TrailingNormRule):
    """Divided by the root mean square per example and position, in float32 for any data type."""

    kinds = tuple(
        f"transformers.models.{model}.modeling_{model}.{name}" for model, name in CLASSES.items()
    )
    examples = (LayerExample(_Norm, (3, 2, 4)),)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """See `ScaleRule`."""
        values = x.float()
        variance = values.square().mean(-1, keepdim=True)
        return (values * torch.rsqrt(variance + module.variance_epsilon)).to(x.dtype)

    def shape(self, module: Any) -> tuple[int, ...]:
        """See `TrailingNormRule`."""
        return tuple(module.weight.shape)
