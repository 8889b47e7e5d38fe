"""Cross entropies with weights of both signs, as in policy gradients, by their magnitudes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from einconv_kfac.curvature.objective.local_curvature import Categorical, Diagonal
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.bernoulli import BernoulliLoss
from einconv_kfac.curvature.objective.nodes.elementary import saved_options
from einconv_kfac.curvature.objective.nodes.softmax import LogSumExp, Softmax
from einconv_kfac.curvature.objective.terms import Term


@dataclass(frozen=True)
class Magnitude(Categorical):
    """``|w| (diag(p) - p p^T)``: the Hessian of weighted cross entropies, in absolute value.

    Rewards make weights ``w`` of both signs (policy gradients). It is the Fisher information of
    the classes, with the magnitude of each example's weight (compare Dauphin et al., 2014).
    """

    name: ClassVar[str] = "the magnitude of the Hessian of a cross entropy"


@dataclass(frozen=True)
class BinaryMagnitude(Diagonal):
    """``|w| p (1 - p)``: the same for two classes with one score.

    Args:
        scores: The scores, ``[*a]``.
    """

    name: ClassVar[str] = Magnitude.name

    scores: Tensor = field(default_factory=lambda: torch.zeros(()))


def magnitudes_of(
    graph: LossGraph, known: Collection[Node], linear: Collection[Edge]
) -> Iterator[tuple[Term, Collection[Edge]]]:
    """Yield terms of logarithms of softmaxes whose curvature is not known, with their ends.

    Args:
        graph: The graph of the loss.
        known: The operations whose curvature is known.
        linear: The ends that the loss is linear in, which the model may end with.
    """
    for node in graph.nonlinear:
        argument, weight = inputs_of(node)[0], graph.seen.get((node, 0))
        if node not in known and argument is not None and weight is not None:
            found = _magnitude(node, weight)
            if found is not None:
                term = Term((argument,), (graph.map_to(argument),), found, kind_of_node(node))
                yield term, first_met([argument], graph.is_end)
    for edge in (each for each in graph.ends if each in linear):
        node = within(edge)[0]  # the same by log-probabilities as by scores
        found = None if kind_of_node(node) != "LogSoftmax" else _magnitude(node, graph.ends[edge])
        if found is not None:
            yield Term((edge,), (graph.map_to(edge),), found, kind_of_node(node)), {edge}


def _magnitude(node: Any, weight: Tensor) -> Magnitude | BinaryMagnitude | None:
    """Return the curvature of the logarithm of a softmax for the magnitudes of its weights.

    Also that of a Bernoulli distribution's loss by its scores.
    """
    rule = NODE_RULES.get(kind_of_node(node))
    if isinstance(rule, BernoulliLoss) and rule.kind == "BinaryCrossEntropyWithLogits":
        return _binary_magnitude(node, weight, rule)
    if isinstance(rule, LogSumExp):
        signed = weight.abs()
    elif isinstance(rule, Softmax) and rule.is_logarithm:
        dim = saved_options(node, ("dim",))["dim"]
        signed = weight * -weight.sum(dim, keepdim=True).sign()
    else:
        return None
    found = rule.curvature(node, rule.inputs(node), signed)
    if not isinstance(found, Categorical):
        return None
    return Magnitude(found.p, found.weight, found.dim)


def _binary_magnitude(node: Any, weight: Tensor, rule: BernoulliLoss) -> BinaryMagnitude | None:
    """Return the curvature of Bernoulli distributions' losses; ``None`` for weights of one sign."""
    if not bool((weight > 0).any() & (weight < 0).any()):
        return None
    inputs = rule.inputs(node)
    own = rule.curvature(node, inputs, weight.abs())
    if not isinstance(own, Diagonal) or inputs[0] is None:
        return None
    return BinaryMagnitude(own.values, scores=inputs[0])
