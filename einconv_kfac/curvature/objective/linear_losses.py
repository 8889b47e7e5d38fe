"""The curvature of a loss that is linear in an output of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.alignment_gradients import log_softmax_before
from einconv_kfac.curvature.objective.graph import Edge, within
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.softmax import categorical


def curvature_of_probabilities(
    edge: Edge, value: Tensor, gradient: Tensor
) -> LocalCurvature | None:
    """Return the curvature of a loss that is linear in log-probabilities, or ``None``.

    The output is the logarithm of a softmax that the model computes, perhaps in another shape. A
    root vector ``sqrt(p_v) (onehot_v - p)`` by the scores is the same one by the log-probabilities,
    since its entries sum to zero.

    Args:
        edge: The edge of the output.
        value: The output.
        gradient: The gradient of the loss at it.
    """
    node = within(edge)[0]
    if (before := log_softmax_before(node)) is None:
        return None
    if node is before:
        rule = NODE_RULES["LogSoftmax"]
        return rule.curvature(node, rule.inputs(node), gradient)
    log_p = value.to(torch.promote_types(value.dtype, torch.float32))
    for dim in range(log_p.ndim):
        if _is_normalised(log_p, dim, torch.finfo(value.dtype).eps ** 0.5):
            return categorical(log_p, -gradient.sum(dim, keepdim=True), dim)
    return None


def _is_normalised(log_p: Tensor, dim: int, tolerance: float) -> bool:
    """Return whether log-probabilities are those of all classes along a dimension."""
    return log_p.shape[dim] > 1 and bool((log_p.logsumexp(dim).abs() <= tolerance).all())
