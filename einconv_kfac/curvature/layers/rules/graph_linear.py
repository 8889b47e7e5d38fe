"""``Linear`` of PyTorch Geometric, also inside of graph convolutions; nodes are rows."""

from __future__ import annotations

from torch import nn

from einconv_kfac.curvature.layers.layer_rule import LayerExample
from einconv_kfac.curvature.layers.rules.linear import LinearRule


class _Linear(nn.Linear):
    """The layer, for the examples."""

    __module__, __qualname__ = "torch_geometric.nn.dense.linear", "Linear"


class GraphLinearRule(LinearRule):
    """Inputs ``[n, *s, d]``, outputs ``[n, *s, co]``."""

    kinds = ("torch_geometric.nn.dense.linear.Linear",)
    examples = (LayerExample(lambda: _Linear(4, 3), (5, 4)),)
