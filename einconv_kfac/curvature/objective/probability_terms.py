"""Functions of probabilities without known curvature, as overlaps of masks, by their slopes.

The Hessian of ``sum_v w_v p_v`` by the scores of a softmax is indefinite. As the probabilities sum
to one, it is also that of the weights without the middle ``m`` of their range, a mean of rewards
``w_v - m`` over classes that are drawn from ``p``. In its place stands what a policy gradient with
these rewards has: the Fisher information ``diag(p) - p p^T``, weighted by their largest magnitude
``r``, half of the range. For a sigmoid it is ``|w| / 2 p (1 - p)``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    first_met,
    inputs_of,
    kind_of_node,
    within,
)
from einconv_kfac.curvature.objective.local_curvature import (
    Categorical,
    Diagonal,
    LocalCurvature,
    Probabilities,
)
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.nodes.elementary import saved_options
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.terms import Term

_NAME = "the information of probabilities, by their slopes"
_KINDS = ("Sigmoid", "Softmax", "SafeSoftmax")
_ENTRYWISE = {*LINEAR, "Mul", "Div"}
"""Linear operations that scale and arrange entries."""


@dataclass(frozen=True)
class SlopesOfSigmoids(Diagonal):
    """``|w| / 2 p (1 - p)`` for probabilities ``p`` with the weights ``w``."""

    name: ClassVar[str] = _NAME


@dataclass(frozen=True)
class SlopesOfClasses(Categorical):
    """``r (diag(p) - p p^T)`` for distributions ``p`` and half the range ``r`` of the weights."""

    name: ClassVar[str] = _NAME


SLOPES = SlopesOfSigmoids, SlopesOfClasses
Information: TypeAlias = "SlopesOfSigmoids | SlopesOfClasses"


def has_probabilities(graph: LossGraph) -> bool:
    """Return whether a loss has probabilities between outputs and loss, or at an output."""
    ends = (within(edge)[0] for edge in graph.outputs)
    return any(kind_of_node(node) in _KINDS for node in (*graph.nonlinear, *ends))


def probability_terms(
    graph: LossGraph, known: Collection[Node]
) -> Iterator[tuple[Term, Collection[Edge]]]:
    """Yield terms of probabilities of scores that a model returns, or that it returns, with ends.

    Args:
        graph: The graph of the loss, which must exist.
        known: The operations whose curvature is known, or that have information of their own.
    """
    used = graph.before(known) | {*known}
    for node in graph.nonlinear:
        if kind_of_node(node) not in _KINDS or node in used:
            continue
        edge, weight = inputs_of(node)[0], graph.seen.get((node, 0))
        if edge is None or weight is None or not _are_scores(edge, graph):
            continue
        own = _by_scores(node, _precise(weight))
        if own is not None:
            term = Term((edge,), (graph.map_to(edge),), own, kind_of_node(node))
            yield term, first_met([edge], graph.is_end)
    given = first_met(
        [edge for node in known for edge in inputs_of(node) if edge is not None], graph.is_end
    )
    for edge in (edge for edge in graph.outputs if edge in graph.ends and edge not in given):
        node = within(edge)[0]
        if kind_of_node(node) in _KINDS:
            found = _by_probabilities(node, graph.value(edge), _precise(graph.ends[edge]))
            yield Term((edge,), (graph.map_to(edge),), found, kind_of_node(node)), {edge}


def _precise(weight: Tensor) -> Tensor:
    """Return weights in float32 at least."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _are_scores(edge: Edge, graph: LossGraph) -> bool:
    """Return whether a tensor has entries of the outputs, and not those of another network."""

    def stops(edge: Edge) -> bool:
        return graph.is_end(edge) or kind_of_node(edge[0]) not in _ENTRYWISE

    return all(graph.is_end(each) for each in first_met([edge], stops))


def _by_scores(node: Any, weight: Tensor) -> Information | None:
    """Return the curvature of probabilities with weights by the scores, unless it is zero."""
    p = node._saved_result.detach().to(weight.dtype)
    if kind_of_node(node) == "Sigmoid":
        return SlopesOfSigmoids(weight.abs() / 2 * p * (1 - p)) if bool(weight.any()) else None
    dim, spread = _spread(node, weight)
    return SlopesOfClasses(p, spread, dim) if bool(spread.any()) else None


def _by_probabilities(node: Any, p: Tensor, weight: Tensor) -> LocalCurvature:
    """Return the same by the probabilities, which leads to it by the scores."""
    p = p.to(weight.dtype)
    if kind_of_node(node) == "Sigmoid":
        variance = p * (1 - p)
        return SlopesOfSigmoids((weight.abs() / 2 / variance).where(variance > 0, 0))
    dim, spread = _spread(node, weight)
    return Probabilities(p, spread, dim)


def _spread(node: Any, weight: Tensor) -> tuple[int, Tensor]:
    """Return the dimension of the classes, and half the range of their weights."""
    dim = saved_options(node, ("dim",))["dim"] % weight.ndim
    return dim, (weight.amax(dim, keepdim=True) - weight.amin(dim, keepdim=True)) / 2
