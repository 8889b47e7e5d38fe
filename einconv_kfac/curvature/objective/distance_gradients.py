"""Gradients of distances that can be differentiated again, also where a distance is zero.

The formulas of torch divide by distances that are zero before they leave these entries out, so that
the next derivative is not a number, or have no next derivative at all. These multiply by the
inverse distance, or by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = tuple[Tensor | None, ...]


def distance_gradients(kind: str, node: Any, gradient: Tensor | None) -> Gradients | None:
    """Return the gradients at the inputs of a distance, or ``None`` for other operations.

    Args:
        kind: The operation.
        node: Its node.
        gradient: The gradient at the output.
    """
    formula = _FORMULAS.get(kind)
    if formula is None or gradient is None or getattr(node, "_saved_p", 2) != 2:
        return None
    return formula(node, gradient)


def _of_rows(node: Any, gradient: Tensor) -> Gradients:
    """Return the gradients of the distances ``[*b, n, m]`` of rows ``[*b, n, d]``, ``[*b, m, d]``.

    With ``w = gradient / distance`` the first one is ``sum_j w_ij (x_i - y_j)``.
    """
    x, y = node._saved_x1.detach(), node._saved_x2.detach()
    w = gradient * _inverse(node._saved_result)
    first = x * w.sum(-1, keepdim=True) - w @ y
    second = y * w.sum(-2).unsqueeze(-1) - w.mT @ x
    return first.sum_to_size(x.shape), second.sum_to_size(y.shape)


def _of_pairs(node: Any, gradient: Tensor) -> Gradients:
    """Return the gradient of the distances of all pairs ``i < j`` of rows ``[n, d]``."""
    x = node._saved_self.detach()
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    parts = (x[i] - x[j]) * (gradient * _inverse(node._saved_result)).unsqueeze(1)
    zeros = torch.zeros_like(x)
    return (zeros.index_add(0, i, parts).index_add(0, j, -parts),)


def _inverse(distances: Tensor) -> Tensor:
    """Return inverse distances, and zero for those that are zero."""
    own = distances.detach()
    return torch.where(own > 0, 1 / own, 0)


_FORMULAS: Mapping[str, Callable[[Any, Tensor], Gradients]] = {
    "Cdist": _of_rows,
    "EuclideanDist": _of_rows,
    "Pdist": _of_pairs,
}
