"""Operations in place on a part of a tensor, as by ``out[:, 0] = 0``."""

from __future__ import annotations

from typing import Any

import torch

from einconv_kfac.curvature.objective.graph import kind_of_node, reached_nodes, zeros_at

# fmt: off
_VIEWS = frozenset(
    (
        "Alias", "AsStrided", "Clone", "Copy", "CopySlices", "Expand", "Permute", "ReshapeAlias",
        "Select", "Slice", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
)
# fmt: on
"""What a gradient passes through where values are assigned or shifted."""


def is_assignment(node: Any) -> bool:
    """Return whether the operation assigns values to a part of a tensor, or adds to them.

    The node does not tell which operation it applies to the part. It is the graph of the gradient
    that shows it: that of an assignment and of a sum has views only.

    Args:
        node: A node of the kind ``CopySlices``.
    """
    with torch.enable_grad():
        gradient = zeros_at((node, 0)).requires_grad_()
        results = node(gradient)
    several = results if isinstance(results, tuple) else (results,)
    nodes = reached_nodes([each for each in several if each is not None and each.requires_grad])
    return all(kind_of_node(each) in _VIEWS or hasattr(each, "variable") for each in nodes)
