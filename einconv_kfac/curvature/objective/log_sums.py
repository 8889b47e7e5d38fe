"""Logarithms of sums of exponentials, written as such: they have the curvature of a logsumexp.

With the terms ``E = exp(s)`` of a sum ``y``, and ``q = E / y``, the Hessian of ``w log y`` by ``s``
is ``w (diag(q) - q q^T)``. Terms may have constant factors, as of a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import (
    Edge,
    backpropagated,
    first_met,
    inputs_of,
    kind_of_node,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Categorical, LocalCurvature
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.units import drawn

_ROUNDING = 64.0
"""Largest relative difference that is attributed to rounding, in units of the machine epsilon."""


def log_of_sum(
    node: Any, weight: Tensor, graph: LossGraph
) -> tuple[list[Edge | None], LocalCurvature] | None:
    """Return the argument and the curvature of ``<weight, log>``, its sums and exponentials.

    ``None`` if the node is no logarithm of sums over one dimension, the exponentials are used
    elsewhere as well, or a weight is negative.

    Args:
        node: The node.
        weight: The derivative of the loss by its output.
        graph: The graph of the loss.
    """
    start = inputs_of(node)[0] if kind_of_node(node) == "Log" else None
    if start is None or not bool((weight >= 0).all()) or not weight.numel():
        return None
    found = first_met([start], lambda e: kind_of_node(e[0]) == "Exp" or graph.is_source(e))
    edge = found.pop() if len(found) == 1 else None
    if edge is None or graph.is_source(edge) or edge == start:
        return None
    sums, own = node._saved_self.detach(), edge[0]._saved_result.detach()  # type: ignore[attr-defined]
    if sums.dtype != own.dtype or not own.is_floating_point() or not bool((sums > 0).all()):
        return None
    with torch.no_grad():
        shares = _shares(start, edge, own, sums, weight, graph)
        dim = None if shares is None else _dimension(start, edge, own, sums, shares, graph)
        if shares is None or dim is None:
            return None
        kept = weight if weight.ndim == own.ndim else weight.unsqueeze(dim)
        precise = torch.promote_types(own.dtype, torch.float32)
        curvature = Categorical(shares.to(precise), kept.to(precise), dim)
    return inputs_of(edge[0])[:1], curvature


def _shares(
    start: Edge, edge: Edge, own: Tensor, sums: Tensor, weight: Tensor, graph: LossGraph
) -> Tensor | None:
    """Return the share of each exponential in its sum, or ``None`` if it is used elsewhere."""

    def before(vector: Tensor) -> Tensor | None:
        return backpropagated({start: vector}, graph.nodes, lambda each: each == edge).get(edge)

    slope, inverse = before(weight / sums), before(1 / sums)
    if slope is None or inverse is None or not _are_close(slope, graph.seen[edge]):
        return None
    return own * inverse


def _dimension(
    start: Edge, edge: Edge, own: Tensor, sums: Tensor, shares: Tensor, graph: LossGraph
) -> int | None:
    """Return the dimension that is summed over, or ``None`` if there is none or another term."""
    selected = LinearMap(start, graph.nodes, lambda each: each == edge)
    random = 1 + drawn(own).abs()
    found, total = selected({edge: own * random}), selected({edge: own})
    if found is None or total is None or not _are_close(total, sums):
        return None
    for dim in range(own.ndim):
        mean = (shares * random).sum(dim, keepdim=True)
        for each in (mean, mean.squeeze(dim)):
            if each.shape == sums.shape and _are_close(each * sums, found):
                return dim
    return None


def _are_close(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors differ by rounding at most."""
    return torch.allclose(first, second, rtol=_ROUNDING * torch.finfo(first.dtype).eps, atol=0.0)
