"""Whether the terms of a loss are all of its curvature."""

from __future__ import annotations

from collections.abc import Sequence

from einconv_kfac.curvature.objective.densities import Information, WithoutCurvature
from einconv_kfac.curvature.objective.distributions import ENTRIES
from einconv_kfac.curvature.objective.graph import Edge, first_met
from einconv_kfac.curvature.objective.hessian import WHOLE
from einconv_kfac.curvature.objective.local_curvature import Empirical
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.rule_terms import RuleTerms
from einconv_kfac.curvature.objective.terms import Term


def are_complete(
    terms: Sequence[Term], graph: LossGraph, rules: RuleTerms, without: WithoutCurvature
) -> bool:
    """Return whether a loss is a function of tensors by which its terms are its curvature.

    That is so if the first nonlinear operations on the way down from the loss have known curvature,
    or are losses whose information counts, and the loss is linear in no other tensors than these
    operations are computed from. What is before them counts to first order, as a part of the model.
    A policy gradient has no curvature of its own.

    Args:
        terms: All terms of the loss.
        graph: The graph of the loss, which must exist.
        rules: The terms that rules give.
        without: The operations next to the loss without curvature of their own.
    """
    if without.magnitudes or without.samples:
        return False
    if any(isinstance(term.curvature, Empirical) for term in terms):
        return False
    if any(term.name in (WHOLE, ENTRIES) for term in terms):
        return True
    arguments = [edge for term in terms for edge in term.argument]
    nonlinear, informative = {*graph.nonlinear}, _informative(terms)

    def stops(edge: Edge) -> bool:
        return edge[0] in nonlinear or graph.is_end(edge)

    first = first_met([graph.root], stops)
    curved = {*rules.curved, *rules.inner, *rules.hidden}
    unknown = {edge for edge in first if edge[0] in nonlinear and edge[0] not in curved}
    return not any(
        _has_weight(edge, graph) for edge in unknown - informative
    ) and first & graph.ends.keys() <= first_met(arguments, stops)


def _informative(terms: Sequence[Term]) -> set[Edge]:
    """Return the losses whose information is a term."""
    own = [term for term in terms if isinstance(term.curvature, Information)]
    return {edge for term in own for edge in term.argument}


def _has_weight(edge: Edge, graph: LossGraph) -> bool:
    """Return whether a tensor has a weight in a loss, as one that is masked has not."""
    weight = graph.seen.get(edge)
    return weight is not None and bool((weight != 0).any())
