"""Samples and scores of policies in a loss: where weights of both signs tell of rewards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

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
)
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.magnitudes import BinaryMagnitude
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.terms import Term

_ROUNDING = 1e-3
"""Sum of a gradient over classes, relative to its weights, that is attributed to rounding."""
_CLIPPING = {"Minimum", "Maximum", "Clamp", "ClampMin", "ClampMax"}
_LOGARITHMS = {"Log", "Log1P", "LogSoftmax", "Logsumexp", "LogSigmoid", "Pow", "Xlogy", "Lgamma"}
_LOGARITHMS |= {"Abs", "Mvlgamma", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"}
"""Operations that logarithms of densities are sums of."""

_SUMS = {"Add", "Stack", "Cat"}
"""Operations by which a loop over samples adds up a loss."""
Groups: TypeAlias = "dict[tuple[tuple[str, ...], bool], dict[Edge, None]]"
"""Tensors by the operations that follow them, and by whether one of these clips."""
Terms: TypeAlias = Sequence[tuple[Term, Collection[Edge]]]
"""Terms with the ends that each depends on."""


@dataclass(frozen=True)
class SampledInformation(Diagonal):
    """``|w|`` for logarithms ``l`` of densities at samples, whose weights ``w`` have both signs.

    The mean of ``J^T J`` over samples, where ``J`` is the derivative of ``l``, is the Fisher
    information of the distribution.

    Args:
        is_known: Whether rules of operations give the curvature of the samples already.
    """

    name: ClassVar[str] = "the information of samples of a policy"

    is_known: bool = False


def sample_terms(classes: Terms, graph: LossGraph, known: Collection[Node]) -> Iterator[Term]:
    """Yield the terms of logarithms of densities whose weights have both signs.

    Args:
        classes: Terms of logarithms of softmaxes whose weights have both signs, with their ends.
        graph: The graph of the loss, which must exist.
        known: The operations whose curvature is known.
    """
    unknown, found = {*graph.nonlinear} - {*known}, scores_of(classes, graph)
    covered = {node for node in unknown if found.keys() & {*inputs_of(node)}}
    for edge, is_known in _logarithms(graph, unknown - covered):
        if (weight := _weight(edge, graph)) is not None:
            own = SampledInformation(weight.abs(), is_known=is_known)
            yield Term((edge,), (graph.map_to(edge),), own, kind_of_node(edge[0]))


def is_known(term: Term) -> bool:
    """Return whether rules of operations give the curvature of a term of samples already."""
    return isinstance(term.curvature, SampledInformation) and term.curvature.is_known


def scores_of(classes: Terms, graph: LossGraph) -> dict[Edge, Categorical | BinaryMagnitude]:
    """Return the scores of policies over classes, and the distributions."""
    found: dict[Edge, Categorical | BinaryMagnitude] = {}
    for term, _ in classes:
        (edge,), own = term.argument, term.curvature
        if isinstance(own, BinaryMagnitude):
            found[edge] = own
        if edge in found or not isinstance(own, Categorical):
            continue
        is_end = kind_of_node(within(edge)[0]) == "LogSoftmax"
        if _is_rewarded(edge, own, graph) if is_end else _is_invariant(edge, own, graph):
            found[edge] = own
    return found


def _logarithms(graph: LossGraph, unknown: Collection[Node]) -> Iterator[tuple[Edge, bool]]:
    """Yield logarithms of densities that enter a loss with weights of both signs.

    They enter it themselves, or as ratios of densities, clipped or not. The loss computes them, or
    the model does. Those of single samples, as a loop over an episode appends to a list, are
    judged together where they enter the loss by the same operations. The curvature of those with
    positive weights may be known; the second value tells.

    Args:
        graph: The graph of the loss.
        unknown: The nonlinear operations whose curvature is not known.
    """
    nonlinear, seen = {*graph.nonlinear}, set[Edge]()
    ends = {edge for edge in graph.outputs if _is_logarithm(edge)}
    wanted = {(node, 0) for node in unknown if kind_of_node(node) in _LOGARITHMS} | ends
    others = {(node, 0) for node in nonlinear if kind_of_node(node) in _LOGARITHMS} - wanted
    waiting: Groups = {((), False): {graph.root: None}} if wanted else {}

    def stops(edge: Edge) -> bool:
        return edge[0] in nonlinear or graph.is_source(edge)

    while waiting:
        path, is_clipped = key = next(iter(waiting))
        edges = [edge for edge in waiting.pop(key) if edge not in seen]
        seen.update(edges)
        found: dict[Edge, tuple[Edge, Tensor, bool]] = {}
        for edge in edges:
            kind, weight = kind_of_node(edge[0]), _weight(edge, graph)
            is_ratio = kind == "Exp" and edge[0] in unknown and not graph.is_source(edge)
            own = inputs_of(edge[0])[0] if is_ratio else edge
            if weight is None or own is None or (is_clipped and not is_ratio):
                continue
            met = first_met([own], stops)
            if met & wanted or (weight.numel() == 1 and met & others):
                found[edge] = own, weight, not met & wanted
        chosen = _of_both_signs(found)
        yield from ((found[edge][0], found[edge][2]) for edge in chosen)
        left = [e for e in edges if e not in chosen and _weight(e, graph) is not None]
        for edge in left:
            kind, is_curved = kind_of_node(edge[0]), edge[0] in nonlinear
            if graph.is_source(edge) or (is_curved and kind not in _CLIPPING):
                continue
            after = path if kind in _SUMS else (*path, kind)
            group = waiting.setdefault((after, is_clipped or is_curved), {})
            group.update({each: None for each in inputs_of(edge[0]) if each is not None})


def _of_both_signs(found: Mapping[Edge, tuple[Edge, Tensor, bool]]) -> list[Edge]:
    """Return the tensors with weights of both signs, and the numbers if theirs have both signs."""
    single = {edge: w.flatten() for edge, (_, w, _) in found.items() if w.numel() == 1}
    is_new = not all(found[edge][2] for edge in single)
    are_both = is_new and _has_both_signs(torch.cat([*single.values()]))
    return [
        edge
        for edge, (_, w, _) in found.items()
        if _has_both_signs(w) or (are_both and edge in single)
    ]


def _weight(edge: Edge, graph: LossGraph) -> Tensor | None:
    """Return the derivative of the loss by a tensor."""
    return graph.seen.get(edge, graph.gradients.get(edge))


def _is_logarithm(output: Edge) -> bool:
    """Return whether a model ends with a sum of logarithms, other than those of a softmax."""
    start = within(output)
    found = first_met([start], lambda edge: kind_of_node(edge[0]) not in LINEAR)
    kinds = {kind_of_node(edge[0]) for edge in found}
    return bool(kinds & (_LOGARITHMS - {"LogSoftmax"}))


def _has_both_signs(weight: Tensor) -> bool:
    """Return whether weights have both signs."""
    return weight.numel() > 1 and bool((weight > 0).any() & (weight < 0).any())


def _is_rewarded(edge: Edge, own: Categorical, graph: LossGraph) -> bool:
    """Return whether a cross entropy of log-probabilities has a negative weight."""
    gradient = _weight(edge, graph)
    return gradient is not None and bool((gradient.sum(own.dim) > 0).any())


def _is_invariant(edge: Edge, own: Categorical, graph: LossGraph) -> bool:
    """Return whether a loss does not depend on what all scores of a distribution share.

    Those of a mixture are not scores alone, but logarithms of densities.
    """
    gradient = _weight(edge, graph)
    if gradient is None:
        return False
    shared = gradient.double().sum(own.dim).abs().sum()
    return bool(shared <= _ROUNDING * own.weight.double().sum())
