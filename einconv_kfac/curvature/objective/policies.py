"""How far a step moves the distributions of a policy gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import (
    Edge,
    Stops,
    first_met,
    inputs_of,
    kind_of_node,
    within,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Categorical, Diagonal
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


Terms: TypeAlias = Sequence[tuple[Term, Collection[Edge]]]
"""Terms with the ends that each depends on."""


@dataclass(frozen=True)
class SampledInformation(Diagonal):
    """``|w|`` for logarithms ``l`` of densities at samples, whose weights ``w`` have both signs.

    The mean of ``J^T J`` over samples, where ``J`` is the derivative of ``l``, is the Fisher
    information of the distribution.
    """

    name: ClassVar[str] = "the information of samples of a policy"


class Policy(Protocol):
    """Distributions whose logarithms enter a loss with weights of both signs."""

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """Return the sum of ``KL(before, after)`` over the distributions that count, in float64.

        Their number follows it, ``[2]``. Those without a weight, as of masked tokens, do not count.

        Args:
            changes: The changes of earlier tensors.
        """


@dataclass(frozen=True)
class ClassPolicy:
    """Distributions over classes.

    Args:
        scores: The derivative of their scores by earlier tensors.
        before: The distributions in the recorded pass, with the weight of each.
    """

    scores: LinearMap
    before: Categorical

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`."""
        dim, counts = self.before.dim, self.before.weight.squeeze(self.before.dim) != 0
        change, p = self.scores(changes), self.before.p.double()
        total = counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        centred = change.double() - (p * change.double()).sum(dim, keepdim=True)
        found = torch.logsumexp(p.log() + centred, dim)
        return torch.stack([found.where(counts, 0).sum(), total])


@dataclass(frozen=True)
class BinaryPolicy:
    """Bernoulli distributions by their scores.

    Args:
        scores: The derivative of the scores by earlier tensors.
        before: The distributions in the recorded pass.
    """

    scores: LinearMap
    before: BinaryMagnitude

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`."""
        change, scores, counts = self.scores(changes), self.before.scores, self.before.values != 0
        total = counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        change, scores = change.double(), scores.double()
        grown = functional.softplus(scores + change) - functional.softplus(scores)
        found = grown - scores.sigmoid() * change
        return torch.stack([found.where(counts, 0).sum(), total])


@dataclass(frozen=True)
class SampledPolicy:
    """Distributions of which the logarithms of densities at samples are known.

    Args:
        logarithms: The derivative of the logarithms by earlier tensors.
        counts: Whether each has a weight in the loss.
    """

    logarithms: LinearMap
    counts: Tensor

    def divergence(self, changes: Mapping[Edge, Tensor]) -> Tensor:
        """See `Policy`; ``exp(d) - 1 - d`` for the change ``d`` of a logarithm.

        It is not negative, and its mean over samples of the distribution before is the divergence.
        """
        change, total = self.logarithms(changes), self.counts.sum().double()
        if change is None:
            return torch.stack([torch.zeros_like(total), total])
        found = torch.expm1(change.double()) - change.double()
        return torch.stack([found.where(self.counts, 0).sum(), total])


def policies_of(
    classes: Terms, samples: Iterable[Term], graph: LossGraph, stops: Stops
) -> Iterator[Policy]:
    """Yield the policies of a loss.

    Args:
        classes: See `sample_terms`.
        samples: What that returned.
        graph: The graph of the loss, which must exist.
        stops: Whether a tensor's change is given.
    """
    for edge, own in _scores(classes, graph).items():
        map_ = LinearMap(edge, graph.nodes, stops)
        if isinstance(own, BinaryMagnitude):
            yield BinaryPolicy(map_, own)
        else:
            yield ClassPolicy(map_, own)
    for term in samples:
        (edge,), counts = term.argument, term.curvature.support() != 0
        yield SampledPolicy(LinearMap(edge, graph.nodes, stops), counts)


def sample_terms(classes: Terms, graph: LossGraph, known: Collection[Node]) -> Iterator[Term]:
    """Yield the terms of logarithms of densities whose weights have both signs.

    Args:
        classes: Terms of logarithms of softmaxes whose weights have both signs, with their ends.
        graph: The graph of the loss, which must exist.
        known: The operations whose curvature is known.
    """
    unknown, found = {*graph.nonlinear} - {*known}, _scores(classes, graph)
    covered = {node for node in unknown if found.keys() & {*inputs_of(node)}}
    for edge in _logarithms(graph, unknown - covered):
        if (weight := _weight(edge, graph)) is not None:
            own = SampledInformation(weight.abs())
            yield Term((edge,), (graph.map_to(edge),), own, kind_of_node(edge[0]))


def _scores(classes: Terms, graph: LossGraph) -> dict[Edge, Categorical | BinaryMagnitude]:
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


def _logarithms(graph: LossGraph, unknown: Collection[Node]) -> Iterator[Edge]:
    """Yield logarithms of densities that enter a loss with weights of both signs.

    They enter it themselves, or as ratios of densities, clipped or not. The loss computes them, or
    the model does.

    Args:
        graph: The graph of the loss.
        unknown: The nonlinear operations whose curvature is not known.
    """
    nonlinear, seen = {*graph.nonlinear}, set[Edge]()
    wanted = {(node, 0) for node in unknown if kind_of_node(node) in _LOGARITHMS}
    wanted |= {edge for edge in graph.outputs if _is_logarithm(edge)}
    waiting = [(graph.root, False)] if wanted else []

    def stops(edge: Edge) -> bool:
        return edge[0] in nonlinear or graph.is_source(edge)

    while waiting:
        edge, is_clipped = waiting.pop()
        kind, is_source = kind_of_node(edge[0]), graph.is_source(edge)
        weight = _weight(edge, graph)
        if edge in seen or weight is None:
            continue
        seen.add(edge)
        is_ratio = kind == "Exp" and edge[0] in unknown and not is_source
        if is_ratio or not is_clipped:
            own = inputs_of(edge[0])[0] if is_ratio else edge
            if own is not None and _has_both_signs(weight) and first_met([own], stops) & wanted:
                yield own
                continue
        if not is_source and (edge[0] not in nonlinear or kind in _CLIPPING):
            clips = is_clipped or edge[0] in nonlinear
            waiting += [(each, clips) for each in inputs_of(edge[0]) if each is not None]


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
