"""Samples and scores of policies in a loss: where weights of both signs tell of rewards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    dependents,
    first_met,
    inputs_of,
    kind_of_node,
    metadata_of,
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
_OF_POSITIVE = {"Log", "Log2", "Log10", "Sqrt", "Rsqrt"}
"""Operations whose inputs are positive, which logarithms of densities are not in general."""
_SUMS_AND_PRODUCTS = {*LINEAR, "Mul", "Div", "Abs"}
_SUMS = {"Add", "Stack", "Cat"}
"""Operations by which a loop over samples adds up a loss."""
Groups: TypeAlias = "dict[tuple[tuple[object, ...], bool], dict[Edge, None]]"
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
    for edge, _, is_known, _ in _Samples(graph, unknown - covered).found():
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


class _Sample(NamedTuple):
    """The logarithm of a density in a loss.

    Args:
        edge: The logarithm.
        weight: The derivative of the loss by it, or by the ratio of densities.
        is_known: Whether the curvature of all operations that it consists of is known.
        kinds: What it is computed from: operations, and shapes of tensors that depend on the model.
    """

    edge: Edge
    weight: Tensor
    is_known: bool
    kinds: frozenset[object]


class _Samples:
    """Logarithms of densities that enter a loss with weights of both signs.

    They enter it themselves, or as ratios of densities, clipped or not. The loss computes them, or
    the model does. Those of single samples, as a loop over an episode appends to a list, are
    judged together where they enter the loss by the same operations and are computed alike. The
    curvature of those with weights of one sign may be known.

    Args:
        graph: The graph of the loss.
        unknown: The nonlinear operations whose curvature is not known.
    """

    def __init__(self, graph: LossGraph, unknown: Collection[Node]) -> None:
        self._graph, self._unknown = graph, {*unknown}
        self._nonlinear = {*graph.nonlinear}
        ends = {edge for edge in graph.outputs if _is_logarithm(edge)}
        logarithms = {(n, 0) for n in self._nonlinear if kind_of_node(n) in _LOGARITHMS}
        self._positive = _positive(graph)
        self._all = logarithms | ends
        self._wanted = {edge for edge in logarithms if edge[0] in self._unknown} | ends

    def found(self) -> Iterator[_Sample]:
        """Yield them."""
        seen = set[Edge]()
        waiting: Groups = {((), False): {self._graph.root: None}} if self._wanted else {}
        while waiting:
            path, is_clipped = key = min(waiting, key=lambda key: len(key[0]))  # whole groups
            edges = [edge for edge in waiting.pop(key) if edge not in seen]
            seen.update(edges)
            possible = _of_both_signs(
                {e: w for e in edges if (w := _weight(e, self._graph)) is not None}
            )
            found = ((edge, self._sample(edge, is_clipped)) for edge in possible)
            samples = {edge: own for edge, own in found if own is not None}
            chosen = _chosen(samples)
            yield from (samples[edge] for edge in chosen)
            for edge in edges:
                if edge not in chosen and self._is_passed(edge):
                    is_curved = edge[0] in self._nonlinear
                    for place, before in enumerate(inputs_of(edge[0])):
                        if before is not None:
                            after = (_path(path, edge[0], place), is_clipped or is_curved)
                            waiting.setdefault(after, {})[before] = None

    def _sample(self, edge: Edge, is_clipped: bool) -> _Sample | None:
        """Return the logarithm of a density at a tensor, if there may be one."""
        graph, kind = self._graph, kind_of_node(edge[0])
        is_ratio = kind == "Exp" and edge[0] in self._unknown and not graph.is_source(edge)
        weight, own = _weight(edge, graph), inputs_of(edge[0])[0] if is_ratio else edge
        is_other = (is_clipped or edge in self._positive) and not is_ratio
        if weight is None or own is None or is_other:
            return None
        met = first_met([own], lambda e: e[0] in self._nonlinear or graph.is_source(e))
        is_new = bool(met & self._wanted)
        if not is_new and (weight.numel() > 1 or not met & self._all):
            return None
        below = dependents(own, graph.is_source) if weight.numel() == 1 else {}
        is_new = is_new or bool(self._unknown.intersection(below))
        kinds = {kind_of_node(e[0]) for e in met if e in self._all}
        inputs = (e for node in below for e in inputs_of(node) if e is not None)
        shapes = {tuple(metadata_of(e).shape) for e in inputs if e in graph.gradients}
        return _Sample(own, weight, not is_new, frozenset[object](kinds | shapes))

    def _is_passed(self, edge: Edge) -> bool:
        """Return whether what enters an operation enters the loss linearly, or clipped."""
        graph = self._graph
        if graph.is_source(edge) or _weight(edge, graph) is None:
            return False
        return edge[0] not in self._nonlinear or kind_of_node(edge[0]) in _CLIPPING


def _path(path: tuple[object, ...], node: Node, place: int) -> tuple[object, ...]:
    """Return by which operations an input enters a loss; sums of a loop do not count."""
    kind = kind_of_node(node)
    return path if kind in _SUMS or (kind == "Sub" and not place) else (*path, kind, place)


def _chosen(samples: Mapping[Edge, _Sample]) -> set[Edge]:
    """Return tensors with weights of both signs; numbers are judged with those computed alike."""
    alike: dict[object, list[Edge]] = defaultdict(list)
    for edge, own in samples.items():
        alike[own.kinds if own.weight.numel() == 1 else edge].append(edge)
    chosen = set[Edge]()
    for edges in alike.values():
        if not all(samples[edge].is_known for edge in edges):
            chosen |= _of_both_signs({edge: samples[edge].weight for edge in edges})
    return chosen


def _of_both_signs(weights: Mapping[Edge, Tensor]) -> set[Edge]:
    """Return the tensors with weights of both signs, and all numbers if theirs have both signs."""
    single = {edge: weight.flatten() for edge, weight in weights.items() if weight.numel() == 1}
    chosen = {edge for edge, weight in weights.items() if _has_both_signs(weight)}
    are_both = len(single) > 1 and _has_both_signs(torch.cat([*single.values()]))
    return chosen.union(single) if are_both else chosen


def _positive(graph: LossGraph) -> set[Edge]:
    """Return the tensors whose sums and products logarithms or roots are taken of."""
    found = set[Edge]()
    waiting = [node for node in graph.nonlinear if kind_of_node(node) in _OF_POSITIVE]
    while waiting:
        for edge in inputs_of(waiting.pop()):
            if edge is not None and edge not in found and graph.depends(edge):
                found.add(edge)
                waiting += [edge[0]] if kind_of_node(edge[0]) in _SUMS_AND_PRODUCTS else []
    return found


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
