"""The terms of a loss whose curvature the rules of single operations and of loss modules give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.alignment_gradients import is_alignment
from einconv_kfac.curvature.objective.enclosed_calls import EnclosedCall
from einconv_kfac.curvature.objective.graph import (
    Edge,
    dependents,
    first_met,
    inputs_of,
    kind_of_node,
)
from einconv_kfac.curvature.objective.linear_losses import curvature_of_probabilities
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.log_probabilities import log_of_softmax
from einconv_kfac.curvature.objective.log_sums import log_of_sum
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.bilinear import Quotient
from einconv_kfac.curvature.objective.nodes.squares import (
    Argument,
    is_squared,
    root_of_squares,
    squared,
)
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.unit_vectors import unit_vectors
from einconv_kfac.curvature.objective.variance_terms import variance_term

_CLAMPS = {"Clamp", "ClampMin", "ClampMax"}


class RuleTerms:
    """The terms of a loss that rules give, and the operations that they come from.

    Args:
        graph: The graph of the loss, which must exist.
        calls: The calls of loss modules in it.

    Attributes:
        registered: The calls of loss modules with a rule that a user registered.
        curved: The operations whose curvature is known.
        joined: Those whose curvature is known together with that of operations before them.
        inner: These operations with those before them.
        hidden: The operations inside of the calls of loss modules.
        by_node: The terms of operations whose curvature is known.
        terms: The terms.
    """

    def __init__(self, graph: LossGraph, calls: Sequence[EnclosedCall]) -> None:
        self._graph = graph
        self.registered: list[EnclosedCall] = []
        self.curved: set[Node] = set()
        self.joined: set[Node] = set()
        self.inner: set[Node] = set()
        self._squares: set[Node] = set()  # the operations inside of them
        registered = list(self._registered_terms(calls))
        self.hidden = {node for call in self.registered for node in call.nodes}
        self.by_node = dict(self._curved_terms())
        self.by_node.update(self._denominators())
        self.by_node.update(self._unit_vectors())
        self.curved |= {n for n in graph.nonlinear if is_alignment(kind_of_node(n), n)}
        self.terms = (*registered, *self.by_node.values(), *self._linear_terms())

    def left_out(self) -> set[str]:
        """Return the nonlinear operations that have no curvature of their own."""
        known = {*self.curved, *self.inner, *self._squares, *self.hidden}
        return {kind_of_node(node) for node in self._graph.nonlinear if node not in known}

    def _registered_terms(self, calls: Sequence[EnclosedCall]) -> Iterator[Term]:
        """Yield the terms of loss modules with a rule that a user registered."""
        for each in calls:
            curvature = each.call.curvature(self._graph.seen[each.edge])
            if curvature is not None:
                self.registered.append(each)
                name = type(each.call.loss_fn).__name__
                yield term_at(self._graph, [each.call.argument], curvature, name)

    def _curved_terms(self) -> Iterator[tuple[Node, Term]]:
        """Yield the terms whose curvature is positive semi-definite, with their operations."""
        graph, known = self._graph, self._joined_terms()
        for node in (each for each in graph.nonlinear if each not in self.hidden):
            if node in self.inner and node not in known:
                continue
            rule, weight = NODE_RULES.get(kind_of_node(node)), graph.seen.get((node, 0))
            if rule is None or weight is None:
                continue
            if (variance := variance_term(graph, node, weight)) is not None:
                self.curved |= {node} if variance.is_whole else set()
                yield node, variance
                continue
            square = squared(node, weight, graph.are_same) or root_of_squares(node, weight)
            values = rule.inputs(node)
            own = inputs_of(node)[: len(values)], rule.curvature(node, values, weight)
            argument, curvature = known.get(node) or square or own
            if curvature is not None and not self._is_length(node):
                self.curved.add(node)
                if square:
                    self._squares |= _between(node, argument)
                yield node, term_at(graph, argument, curvature, kind_of_node(node))

    def _is_length(self, node: Node) -> bool:
        """Return whether an operation is a root of squares alone, whose convexity it undoes.

        With a negative weight the root is convex in the squares, but the length is concave.
        """
        if kind_of_node(node) != "Sqrt":
            return False
        graph, nonlinear = self._graph, {*self._graph.nonlinear}

        def stops(edge: Edge) -> bool:
            is_passed = kind_of_node(edge[0]) in _CLAMPS
            return graph.is_source(edge) or (edge[0] in nonlinear and not is_passed)

        found = first_met([edge for edge in inputs_of(node) if edge is not None], stops)
        return not any(
            graph.is_source(each) or not is_squared(each[0], graph.are_same) for each in found
        )

    def _denominators(self) -> Iterator[tuple[Node, Term]]:
        """Yield the terms of tensors by which losses are divided, as by learned variances."""
        graph = self._graph
        for node in (each for each in graph.nonlinear if each not in self.hidden):
            rule, weight = NODE_RULES.get(kind_of_node(node)), graph.seen.get((node, 0))
            if not isinstance(rule, Quotient) or weight is None:
                continue
            numerator, own = inputs_of(node)[:2]
            if own is None or not graph.depends(own):
                continue
            if all(graph.output(edge) is None for edge in first_met([own], graph.is_source)):
                curvature = rule.by_denominator(node, weight)
                if curvature is not None:
                    yield node, term_at(graph, [own], curvature, kind_of_node(node))
            elif numerator is not None and graph.depends(numerator):
                yield from self._scale_terms(rule, node, (numerator, own), weight)

    def _scale_terms(
        self, rule: Quotient, node: Node, edges: tuple[Edge, Edge], weight: Tensor
    ) -> Iterator[tuple[Node, Term]]:
        """Yield the terms of losses that are divided by scales, which are other outputs.

        Args:
            rule: The rule of the quotient.
            node: The quotient.
            edges: Its numerator and its denominator.
            weight: The derivative of the loss by the quotient.
        """
        graph, curvature = self._graph, rule.by_scale(node, weight)
        absolute = None if curvature is None else _absolute(edges[0])
        if curvature is None or not (absolute or self._is_loss(edges[0])):
            return
        if not graph.are_apart(*edges):
            return
        yield node, term_at(graph, edges[1:], curvature, kind_of_node(node))
        if absolute is not None:  # of a Laplace distribution
            own = rule.by_location(node, weight)
            yield absolute, term_at(graph, inputs_of(absolute)[:1], own, kind_of_node(absolute))

    def _unit_vectors(self) -> Iterator[tuple[Node, Term]]:
        """Yield the terms of unit vectors that a loss is linear in, as cosine similarities are."""
        for edge, term in unit_vectors(self._graph):
            self.curved.add(edge[0])
            yield edge[0], term

    def _is_loss(self, edge: Edge) -> bool:
        """Return whether a tensor is linear in operations with curvature alone, as squares."""
        nonlinear = {*self._graph.nonlinear}
        found = first_met([edge], lambda e: e[0] in nonlinear or self._graph.is_source(e))
        return {each[0] for each in found} <= self.curved

    def _joined_terms(self) -> dict[Node, tuple[Argument, LocalCurvature]]:
        """Return logarithms with their curvature and argument together with operations before."""
        graph, found = self._graph, dict[Node, tuple[Argument, LocalCurvature]]()
        for node in graph.nonlinear:
            weight = graph.seen.get((node, 0))
            if weight is None or node in self.hidden:
                continue
            own = log_of_softmax(node, weight, graph) or log_of_sum(node, weight, graph)
            if own is not None:
                found[node] = own
                self.joined.add(node)
                self.inner |= _between(node, own[0])
        return found

    def _linear_terms(self) -> Iterator[Term]:
        """Yield the terms of log-probabilities that a loss is linear in.

        One over alignments counts as such, see `alignment_gradients`.
        """
        graph = self._graph
        bending = [node for node in graph.nonlinear if kind_of_node(node) != "CtcLoss"]
        starts = [edge for node in bending for edge in inputs_of(node) if edge is not None]
        starts += [call.call.argument for call in self.registered]
        bent = first_met(starts, graph.is_end)
        for edge, gradient in graph.ends.items():
            if edge in bent or graph.output(edge) is None:
                continue
            own = curvature_of_probabilities(edge, graph.value(edge), gradient)
            if own is not None:
                yield term_at(graph, [edge], own, "LogSoftmax")


def term_at(
    graph: LossGraph, argument: Iterable[Edge | None], curvature: LocalCurvature, name: str
) -> Term:
    """Return a term by its argument, of which constants are left out; the graph must exist."""
    edges = tuple(edge for edge in argument if edge is not None and graph.depends(edge))
    return Term(edges, tuple(graph.map_to(edge) for edge in edges), curvature, name)


def _absolute(edge: Edge | None) -> Node | None:
    """Return the operation whose absolute values a tensor has, up to their sign."""
    while edge is not None and kind_of_node(edge[0]) == "Neg":
        edge = inputs_of(edge[0])[0]
    return edge[0] if edge is not None and kind_of_node(edge[0]) == "Abs" else None


def _between(node: Node, argument: Iterable[Edge | None]) -> set[Node]:
    """Return an operation and those before it down to an argument."""
    ends = {edge for edge in argument if edge is not None}
    return {*dependents((node, 0), lambda edge: edge in ends)}
