"""Logarithms of entries of a softmax: together they have the curvature of a cross entropy.

With probabilities ``p`` and weights ``c``, the Hessian of ``sum_v c_v log p_v`` by the scores is
``-(sum_v c_v) (diag(p) - p p^T)``. Between softmax and logarithm may be what selects or scales
entries. Where the model itself ends with the softmax, the matrix by its output that has the same
product with every change of the scores is ``-(sum_v c_v) diag(1 / p)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    backpropagated,
    first_met,
    inputs_of,
    kind_of_node,
    within,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature, Probabilities
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.nodes.elementary import saved_options
from einconv_kfac.curvature.objective.nodes.softmax import categorical
from einconv_kfac.curvature.objective.units import drawn

_ROUNDING = 64.0
"""Largest relative difference that is attributed to rounding, in units of the machine epsilon."""


def log_of_softmax(
    node: Any, weight: Tensor, graph: LossGraph
) -> tuple[list[Edge | None], LocalCurvature] | None:
    """Return the argument and the curvature of ``<weight, log>`` and the softmax together.

    ``None`` if the node is no logarithm of such entries, or the curvature is not positive.

    Args:
        node: The node.
        weight: The derivative of the loss by its output.
        graph: The graph of the loss.
    """
    start = inputs_of(node)[0] if kind_of_node(node) == "Log" else None
    if start is None or (edge := _probabilities_before(start, graph)) is None:
        return None
    softmax: Any = within(edge)[0] if graph.is_source(edge) else edge[0]
    p, dim = softmax._saved_result.detach(), saved_options(softmax, ("dim",))["dim"]
    with torch.no_grad():
        slope = _slope(node, weight, start, edge, p, graph)
        if slope is None:
            return None
        total = -(p * slope).sum(dim, keepdim=True)
        found = categorical(p.log(), total, dim)
        if found is None or not graph.is_source(edge):
            return None if found is None else (inputs_of(softmax)[:1], found)
        return [edge], Probabilities(p.to(found.p.dtype), found.weight, found.dim)


def _probabilities_before(start: Edge, graph: LossGraph) -> Edge | None:
    """Return the output of the softmax that alone leads to a tensor, or ``None``."""

    def is_softmax(edge: Edge) -> bool:
        node: Node = within(edge)[0] if graph.is_source(edge) else edge[0]
        return kind_of_node(node) == "Softmax"

    found = first_met([start], lambda edge: is_softmax(edge) or graph.is_source(edge))
    edge = found.pop() if len(found) == 1 else None
    return edge if edge is not None and is_softmax(edge) else None


def _slope(
    node: Any, weight: Tensor, start: Edge, edge: Edge, p: Tensor, graph: LossGraph
) -> Tensor | None:
    """Return the derivative of ``<weight, log>`` by probabilities ``p``.

    ``None`` if an argument of the logarithm is no multiple of one entry. For the multiples ``m``
    of entries, and random numbers ``u``, ``(m p u)^2 = (m p) (m p u^2)``.
    """
    value = node._saved_self.detach()
    if p.dtype != value.dtype or p.numel() == 0:
        return None

    def stops(each: Edge) -> bool:
        return each == edge or graph.is_source(each)

    selected, random = LinearMap(start, graph.nodes, stops), drawn(p)
    parts = [selected({edge: p * factor}) for factor in (1.0, random, random.square())]
    first, second, third = (torch.zeros_like(value) if each is None else each for each in parts)
    rounding = _ROUNDING * torch.finfo(value.dtype).eps
    is_one = (first - value).abs() <= rounding * value
    is_one &= (second.square() - first * third).abs() <= rounding * first * third
    is_none = (first == 0) & (second == 0)  # as of a clamped entry
    if not bool((is_one | is_none | (weight == 0)).all()):
        return None
    own = (weight / value).where(is_one & (weight != 0), 0)
    return own if start == edge else backpropagated({start: own}, graph.nodes, stops).get(edge)
