"""Losses without curvature as densities ``exp(-l / s)``, whose scale ``s`` is the mean loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    dependents,
    first_met,
    kind_of_node,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap, OnceDifferentiableError
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.magnitudes import magnitudes_of
from einconv_kfac.curvature.objective.nodes.squares import absolute_entries
from einconv_kfac.curvature.objective.policy_samples import is_known, sample_terms
from einconv_kfac.curvature.objective.probability_terms import (
    has_probabilities,
    probability_terms,
)
from einconv_kfac.curvature.objective.recorded_results import recorded_result
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.units import drawn

MOST = 0.75
"""The part of a loss from which losses that are linear in pieces count beside others."""
_IN_PIECES = {"Abs", "Clamp", "ClampMin", "ClampMax", "Relu", "LeakyRelu", "Maximum", "Minimum"}


@dataclass(frozen=True)
class Information(Diagonal):
    """The information ``w / s`` of densities ``exp(-l / s) / Z`` about their losses ``l``.

    For ``l = |f - y|`` it is the Fisher information of a Laplace distribution with the scale ``s``
    of maximum likelihood, times that scale: the curvature of ``l`` itself.
    """

    name: ClassVar[str] = "the information of densities exp(-loss / mean loss)"


@dataclass(frozen=True)
class Losses:
    """The results ``l [*a]`` of an operation next to the loss, which adds ``<w, l>`` to it.

    Args:
        edge: The result in the graph.
        map_: Its derivative by the outputs of the model.
        weight: ``w``, the derivative of the loss by it, in float32 at least.
        values: ``l`` in the recorded pass.
        ends: The ends of the graph that it depends on.
        name: Its name.
        bends_alone: Whether the operation is linear in pieces, and neither one before it nor one
            that takes its result has curvature.
    """

    edge: Edge
    map_: LinearMap
    weight: Tensor
    values: Tensor
    ends: Collection[Edge]
    name: str
    bends_alone: bool

    @cached_property
    def sum(self) -> Tensor | None:
        """``<w, l>``; ``None`` if a loss or a weight is negative, or it is zero."""
        if bool((self.values < 0).any() | (self.weight < 0).any()):
            return None
        found = (self.values * self.weight).sum()
        return found if bool(found > 0) and bool(found.isfinite()) else None

    def term(self) -> Term | None:
        """Return the curvature ``J^T diag(w / s) J``, where ``J`` is the derivative of ``l``.

        ``s`` is the mean of ``l`` with the weights ``w``. ``None`` if there is no `sum`.
        """
        if self.sum is None:
            return None
        values = self.weight * (self.weight.sum() / self.sum)
        return Term((self.edge,), (self.map_,), Information(values), self.name)


@dataclass(frozen=True)
class WithoutCurvature:
    """The operations next to a loss that have no curvature of their own.

    Args:
        losses: Those that can be evaluated.
        units: For each end of the graph that the loss depends on by an operation that cannot be
            evaluated: the sum of the magnitudes of the weights with which results enter the loss.
        linear: The ends that the loss is linear in.
        magnitudes: The terms of logarithms of softmaxes whose weights have both signs, with the
            ends that each depends on.
        probabilities: The terms of functions of probabilities, likewise.
        samples: The terms of logarithms of other densities whose weights have both signs, also
            where the curvature of those with positive weights is known.
        loss: The loss.
        unbatched: The ends without a dimension of examples.
    """

    losses: Sequence[Losses]
    units: Mapping[Edge, Tensor]
    linear: Collection[Edge]
    magnitudes: Sequence[tuple[Term, Collection[Edge]]]
    probabilities: Sequence[tuple[Term, Collection[Edge]]]
    samples: Sequence[Term]
    loss: Tensor
    unbatched: Collection[Edge]

    @staticmethod
    def of(graph: LossGraph, known: Collection[Node], loss: Tensor) -> WithoutCurvature:
        """Return those of a graph, which must exist.

        Args:
            graph: The graph of the loss.
            known: The operations whose curvature is known.
            loss: The loss.
        """
        nonlinear, losses = {*graph.nonlinear}, list[Losses]()
        units: dict[Edge, Tensor] = {}

        def stops(edge: Edge) -> bool:
            return edge[0] in nonlinear or graph.is_end(edge)

        found = first_met([graph.root], stops)
        used: set[Node] | None = None  # by operations with curvature, as by squares
        results = [edge for edge in found - graph.ends.keys() if edge[0] in nonlinear]
        for edge in sorted(results, key=lambda e: (graph.nodes[e[0]], e[1])):
            weight = graph.seen.get(edge)
            if edge[0] in known or weight is None:
                continue
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            own = _losses_at(graph, edge, weight, known)
            if own is not None:
                if own.bends_alone:
                    used = graph.before(known) if used is None else used
                    own = replace(own, bends_alone=edge[0] not in used)
                losses.append(own)
                continue
            unit = weight.abs().sum()
            for end in first_met([edge], graph.is_end):
                units[end] = units[end] + unit if end in units else unit
        linear = found & graph.ends.keys()
        magnitudes = list(magnitudes_of(graph, known, linear))
        samples = list(sample_terms(magnitudes, graph, known))
        is_known = not linear and all(edge[0] in known for edge in results)
        is_other = is_known or magnitudes or samples
        probabilities = () if is_other else tuple(_probabilities(graph, known, losses))
        others = magnitudes, probabilities, samples
        return WithoutCurvature(losses, units, linear, *others, loss, graph.unbatched)

    def terms(
        self, places: Mapping[Edge, Tensor], gradients: Mapping[Edge, Tensor]
    ) -> Iterator[tuple[Term, Collection[Edge]]]:
        """Yield terms of losses that depend on given places alone, with ends past the outputs.

        Those of samples of a policy come first, wherever they are.
        Those that bend alone are taken everywhere if they are `MOST` of the loss. Losses of whole
        batches are left out, as they would be one entry.

        Args:
            places: For each end of the graph, where it is so; nowhere at other ends.
            gradients: The gradients at all ends.
        """
        yield from ((term, ()) for term in self.samples if not is_known(term))
        sums = [each.sum for each in self.losses if each.bends_alone and each.sum is not None]
        is_most = bool(sums) and bool(sum(sums) >= MOST * self.loss)
        for losses in self.losses if places or is_most else ():
            inner = {*losses.ends} - {*losses.map_.sources}
            known = losses.ends & gradients.keys()
            rows = [gradients[e].shape[: e not in self.unbatched].numel() for e in known]
            if losses.weight.numel() < max(rows, default=0) or inner - places.keys():
                continue
            term = losses.term()
            if term is not None and not (losses.bends_alone and is_most):
                term = _within(term, places, gradients)
            if term is not None:
                yield term, inner
        for term, ends in (*self.magnitudes, *self.probabilities) if places else ():
            inner = {*ends} - term.sources
            if not inner - places.keys() and _is_within(term, places, gradients):
                yield term, inner

    def scale(self, edge: Edge, slope: Tensor) -> Tensor:
        """Return a number that the part of a loss is linear in that depends on an end.

        It is this part, if it is a sum of `Losses`. Otherwise it is the sum of the magnitudes of
        the weights of results, and of the slope where the loss is linear in the end.

        Args:
            edge: The end.
            slope: The gradient at the end, where it has no curvature.
        """
        own = [each for each in self.losses if edge in each.ends]
        sums = [each.sum for each in own if each.sum is not None]
        if edge in self.units or edge in self.linear or len(sums) < len(own):
            sums = [each.weight.abs().sum() for each in own]
            sums += [self.units[edge]] if edge in self.units else []
            sums += [slope.abs().sum()] if edge in self.linear else []
        result = torch.stack(sums).sum() if sums else torch.ones(())
        return result.where(result > 0, 1)


def _probabilities(
    graph: LossGraph, known: Collection[Node], losses: Sequence[Losses]
) -> Iterator[tuple[Term, Collection[Edge]]]:
    """Yield the terms of functions of probabilities that no losses have information about."""
    if has_probabilities(graph):
        informed = {each.edge[0] for each in losses if each.sum is not None}
        yield from probability_terms(graph, {*known, *informed})


def _within(
    term: Term, places: Mapping[Edge, Tensor], gradients: Mapping[Edge, Tensor]
) -> Term | None:
    """Return the entries of a term that depend on given places alone; ``None`` without such."""
    try:
        touched, values = _touched(term, places, gradients), term.curvature.support()
    except OnceDifferentiableError:
        return None
    kept = values.where(~touched, 0)
    return replace(term, curvature=Information(kept)) if bool(kept.any()) else None


def _is_within(term: Term, places: Mapping[Edge, Tensor], gradients: Mapping[Edge, Tensor]) -> bool:
    """Return whether a term depends on given places alone."""
    try:
        return not bool(_touched(term, places, gradients).any())
    except OnceDifferentiableError:
        return False


def _touched(term: Term, places: Mapping[Edge, Tensor], gradients: Mapping[Edge, Tensor]) -> Tensor:
    """Return which entries of a term depend on other places than those given."""
    others: dict[Edge, Tensor] = {}
    for edge in term.sources & gradients.keys():
        random = drawn(gradients[edge])
        others[edge] = random.where(~places[edge], 0) if edge in places else random
    tangent = term.tangent(others)
    return torch.zeros((), dtype=torch.bool) if tangent is None else tangent != 0


def _losses_at(
    graph: LossGraph, edge: Edge, weight: Tensor, known: Collection[Node]
) -> Losses | None:
    """Return the losses at the result of an operation, or ``None`` if they cannot be found."""
    kind, ends = kind_of_node(edge[0]), first_met([edge], graph.is_end)
    is_curved = bool({*dependents(edge, graph.is_source)} & {*known})
    if (entries := absolute_entries(edge[0], weight)) is not None:
        own, values, weight = entries
        return Losses(own, graph.map_to(own), weight, values, ends, kind, not is_curved)
    found = None if edge[1] else recorded_result(edge)
    if found is None:
        return None
    bends_alone = kind in _IN_PIECES and not is_curved
    return Losses(edge, graph.map_to(edge), weight, found, ends, kind, bends_alone)
