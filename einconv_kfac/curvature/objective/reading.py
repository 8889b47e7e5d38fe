"""Reading a loss: a walk from the loss to the outputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial

from torch import Generator, Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.enclosed_calls import (
    CallAt,
    EnclosedCall,
    enclosed_calls,
    no_call,
)
from einconv_kfac.curvature.objective.graph import (
    Edge,
    dependents,
    first_met,
    inputs_of,
    kind_of_node,
    within,
    zeros_at,
)
from einconv_kfac.curvature.objective.hessian import (
    WHOLE,
    hessian_by,
    is_selection,
    may_lack,
    only_argument,
    with_hessians,
)
from einconv_kfac.curvature.objective.linear_losses import curvature_of_probabilities
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Empirical, LocalCurvature
from einconv_kfac.curvature.objective.log_probabilities import log_of_softmax
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.curvature.objective.loss_graph import LossGraph, Values
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.squares import squared
from einconv_kfac.curvature.objective.repeated_operation import Repeated, operation_of
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.units import example_of_units


class Reading:
    """What the autograd graph of a loss says, as long as the graph exists.

    Args:
        root: The edge of the loss.
        loss: The loss, detached; several numbers with `weight`.
        weight: The weight of each number in the loss.
        output: Returns the value of a model's output at an edge, ``None`` elsewhere.
        parameters: The parameters of the model, whose values a loss may use itself.
        call_at: Returns the call of a loss module whose result is at an edge.
        layers: The outputs of calls of layers.
        account: Receives what the loss is taken as, when its curvature is asked for.

    Attributes:
        graph: The operations between outputs and loss.
        loss: The loss, detached.
        weight: The weight of each number in the loss.
    """

    def __init__(
        self,
        root: Edge,
        loss: Tensor,
        weight: Tensor,
        output: Values,
        parameters: Mapping[Tensor, str],
        call_at: CallAt = no_call,
        layers: Iterable[Edge] = (),
        account: LossAccount | None = None,
    ) -> None:
        self.loss, self.weight, self._account = loss, weight, account
        self.graph = LossGraph(root, weight, output, parameters, layers)
        self._calls = enclosed_calls(self.graph.nodes, call_at, self.graph.is_source)

    def tail(self, sources: Sequence[Edge]) -> Tail:
        """Return what remains of the reading after the graph is freed.

        Args:
            sources: All sources in the order in which the tail takes them.
        """
        return self._tail(sources, self._find_terms)

    def _tail(
        self, sources: Sequence[Edge], terms: Callable[[], tuple[Term, ...]], by: Edge | None = None
    ) -> Tail:
        """See `tail`.

        Args:
            sources: All sources.
            terms: Returns the terms.
            by: A tensor by which all sources enter the loss, and which takes their place. The
                result is that close to it: selections, as of a maximum, stay.
        """
        calls = [
            call
            for call in self._calls
            if call in self._registered or call.needs_module(self.graph.nonlinear)
        ]
        results = {call.edge: call for call in calls}
        hidden = {node for call in calls for node in call.nodes}
        single = {node for node in self.graph.nonlinear if node not in hidden}
        nodes = self.graph.nodes
        if by is not None:
            calls, results, nodes = [], {}, dependents(self.graph.root, lambda edge: edge == by)
            single = {
                each for each in nodes if each in self.graph.nonlinear and not is_selection(each)
            }
        own = Repeated(self.graph.nodes, self.graph.depends, self.graph.output)

        def stops(edge: Edge) -> bool:
            return edge == by or edge[0] in single or edge in results or self.graph.is_source(edge)

        operations = [
            result
            for node in nodes
            for result in (
                *([operation_of(node, own, stops)] if node in single else ()),
                *(c.operation(self.graph.nodes, stops) for c in calls if c.edge[0] is node),
            )
        ]
        return Tail(
            tuple(sources),
            tuple(zeros_at(edge) if edge == by else self.graph.value(edge) for edge in sources),
            tuple(self.graph.gradients.get(edge) for edge in sources),
            self.loss,
            self.weight,
            terms,
            tuple(operations),
            LinearMap(self.graph.root, self.graph.nodes, stops),
        )

    def sample(self, generator: Generator) -> dict[Edge, Tensor]:
        """Draw gradients at the ends whose second moment is the curvature of the loss."""
        start: dict[Edge, Tensor] = {}
        for term in self._find_terms():
            for edge, root in term.gradients(term.sample(generator)).items():
                start[edge] = start[edge] + root if edge in start else root
        return self.graph.at_ends(start)

    def roots(self) -> Iterator[tuple[dict[Edge, Tensor], bool]]:
        """Yield gradients at the ends whose outer products sum to the curvature.

        Each touches one unit (a class score vector, an entry) of every example, or one alone that
        may depend on several examples; the second value tells which.
        """
        values = {edge: self.graph.value(edge) for edge in self.graph.outputs}
        device = next(iter(self.graph.gradients.values())).device
        for term in self._find_terms():
            for root, is_alone in term.roots(example_of_units(term, values, device)):
                yield self.graph.at_ends(term.gradients(root)), is_alone

    def _registered_terms(self) -> Iterator[Term]:
        """Yield the terms of loss modules with a rule that a user registered."""
        self._registered: list[EnclosedCall] = []
        for each in self._calls:
            curvature = each.call.curvature(self.graph.seen[each.edge])
            if curvature is not None:
                self._registered.append(each)
                argument = each.call.argument
                name = type(each.call.loss_fn).__name__
                yield Term((argument,), (self.graph.map_to(argument),), curvature, name)

    def _curved_terms(self) -> Iterator[Term]:
        """Yield the terms whose curvature is positive semi-definite."""
        hidden = {node for call in self._registered for node in call.nodes}
        self._curved: set[Node] = set()
        self._joined: set[Node] = set()  # with operations before them
        self._inner: set[Node] = set()  # these operations, and those inside of squares
        for node in (each for each in self.graph.nonlinear if each not in hidden):
            rule, weight = NODE_RULES.get(kind_of_node(node)), self.graph.seen.get((node, 0))
            if rule is None or weight is None:
                continue
            square, values = squared(node, weight, self.graph.are_same), rule.inputs(node)
            own = inputs_of(node)[: len(values)], rule.curvature(node, values, weight)
            together = log_of_softmax(node, weight, self.graph)
            if together is not None:
                self._joined.add(node)
            argument, curvature = together or square or own
            if curvature is not None:
                self._curved.add(node)
                if together or square:
                    self._inner |= {*dependents((node, 0), lambda edge, a=argument: edge in a)}
                yield _term(self.graph, argument, curvature, kind_of_node(node))

    def _linear_terms(self) -> Iterator[Term]:
        """Yield the terms of log-probabilities that a loss is linear in."""
        graph = self.graph
        starts = [edge for node in graph.nonlinear for edge in inputs_of(node) if edge is not None]
        starts += [call.call.argument for call in self._registered]
        bent = first_met(starts, graph.is_end)
        for edge, gradient in graph.ends.items():
            own = None if edge in bent else curvature_of_probabilities(edge, gradient)
            if own is not None:
                yield Term((edge,), (graph.map_to(edge),), own, kind_of_node(within(edge)[0]))

    @cached_property
    def _find_terms(self) -> Callable[[], tuple[Term, ...]]:
        """Return a function that finds the terms, also after the graph is freed."""
        by_rules = (*self._registered_terms(), *self._curved_terms(), *self._linear_terms())
        known = {*self._curved, *self._inner, *(n for c in self._registered for n in c.nodes)}
        left_out = {kind_of_node(node) for node in self.graph.nonlinear if node not in known}
        find = self._hessians(by_rules)
        return cache(partial(_all_terms, self.graph, find, left_out, self._account))

    def _hessians(self, terms: Sequence[Term]) -> Callable[[], Sequence[Term]]:
        """Return a function that takes Hessians where rules of operations do not give them."""
        graph, nonlinear = self.graph, set(self.graph.nonlinear)
        is_read = not self._registered and not graph.inner
        if not is_read or not may_lack(graph.root, nonlinear, self._curved, self._joined):
            return lambda: terms
        by = only_argument(graph.root, nonlinear, graph.is_source)
        if by is None or (tail := self._tail([by], tuple, by)).unknown():
            tail = self._tail(graph.sources, tuple)
            return partial(with_hessians, terms, tail, graph.outputs)
        known = terms if by in graph.outputs else ()

        def by_argument() -> Sequence[Term]:
            found = hessian_by(tail, by, known)
            return terms if found is None else [_term(graph, [by], found, WHOLE)]

        return by_argument


def _all_terms(
    graph: LossGraph,
    find: Callable[[], Sequence[Term]],
    left_out: Collection[str],
    account: LossAccount | None,
) -> tuple[Term, ...]:
    """Return the terms found, and the empirical Fisher at ends to which none gives curvature."""
    terms = find()
    curved = {edge for term in terms for edge in term.sources}
    if graph.inner:
        starts = [edge for term in terms for edge in term.argument]
        curved |= first_met(starts, graph.is_end)
    others = {e: g for e, g in graph.ends.items() if e not in curved and g.ndim}
    name = ", ".join(sorted(left_out)) or "linear"
    empirical = (Term((e,), (graph.map_to(e),), Empirical(g), name) for e, g in others.items())
    result = (*terms, *empirical)
    if account is not None:
        is_whole = any(term.name == WHOLE for term in terms)
        account.add_(result, () if is_whole else left_out)
    return result


def _term(
    graph: LossGraph, argument: Iterable[Edge | None], curvature: LocalCurvature, name: str
) -> Term:
    """Return a term by its argument, of which constants are left out."""
    edges = tuple(edge for edge in argument if edge is not None and graph.depends(edge))
    return Term(edges, tuple(graph.map_to(edge) for edge in edges), curvature, name)
