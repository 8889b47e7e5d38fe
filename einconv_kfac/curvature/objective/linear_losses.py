"""The curvature of a loss that is linear in an output of a model."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, kind_of_node, within
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.node_registry import NODE_RULES


def curvature_of_probabilities(edge: Edge, gradient: Tensor) -> LocalCurvature | None:
    """Return the curvature of a loss that is linear in log-probabilities, or ``None``.

    The output is the logarithm of a softmax that the model computes. A root vector
    ``sqrt(p_v) (onehot_v - p)`` by the scores is the same one by the log-probabilities, since its
    entries sum to zero.

    Args:
        edge: The edge of the output.
        gradient: The gradient of the loss at the output.
    """
    node = within(edge)[0]
    if kind_of_node(node) != "LogSoftmax":
        return None
    rule = NODE_RULES["LogSoftmax"]
    return rule.curvature(node, rule.inputs(node), gradient)
