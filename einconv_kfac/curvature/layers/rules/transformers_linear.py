"""``Conv1D`` of Hugging Face transformers: a linear layer whose weight is stored transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.rules.linear import LinearRule


class _Conv1D(nn.Module):
    """The layer, for the examples."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class TransformersLinearRule(LinearRule):
    """Inputs ``[n, *s, d]``, outputs ``[n, *s, co]``, weight ``[d, co]``; as in GPT-2."""

    kinds = ("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
    examples = (LayerExample(_Conv1D, (3, 2, 4)),)

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (1, *module.weight.shape), (0, 2, 1)
