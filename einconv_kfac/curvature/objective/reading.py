"""Reading a loss: a walk from the loss to the outputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType

from torch import Generator, Tensor

from einconv_kfac.curvature.objective.complete_terms import are_complete
from einconv_kfac.curvature.objective.densities import WithoutCurvature
from einconv_kfac.curvature.objective.distributions import Distributions
from einconv_kfac.curvature.objective.enclosed_calls import (
    CallAt,
    enclosed_calls,
    no_call,
)
from einconv_kfac.curvature.objective.found_terms import FoundTerms
from einconv_kfac.curvature.objective.graph import (
    Edge,
    Stops,
    dependents,
    first_met,
    zeros_at,
)
from einconv_kfac.curvature.objective.hessian import (
    by_arguments,
    may_lack,
    with_hessians,
)
from einconv_kfac.curvature.objective.hessian_arguments import arguments
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.curvature.objective.loss_graph import LossGraph, Values
from einconv_kfac.curvature.objective.nodes.reductions import is_selection
from einconv_kfac.curvature.objective.policies import Policy, policies_of
from einconv_kfac.curvature.objective.policy_samples import is_known
from einconv_kfac.curvature.objective.repeated_operation import Repeated, operation_of
from einconv_kfac.curvature.objective.rule_terms import RuleTerms
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.unbatched import LayerOutput
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
        layers: Mapping[Edge, LayerOutput] = MappingProxyType({}),
        account: LossAccount | None = None,
    ) -> None:
        self.loss, self.weight, self._account = loss, weight, account
        self.graph = LossGraph(root, weight, output, parameters, layers)
        self._calls = enclosed_calls(self.graph.nodes, call_at, self.graph.is_source)

    @cached_property
    def _rules(self) -> RuleTerms:
        """The terms that rules give."""
        return RuleTerms(self.graph, self._calls)

    def is_complete(self) -> bool:
        """Return whether its terms are all of its curvature, while the graph exists."""
        return are_complete(self._find_terms.all, self.graph, self._rules, self._without)

    def tail(self, sources: Sequence[Edge]) -> Tail:
        """Return what remains of the reading after the graph is freed.

        Args:
            sources: All sources in the order in which the tail takes them.
        """
        whole = self._whole
        order = [whole.sources.index(edge) for edge in sources]
        values = tuple(whole.values[index] for index in order)
        slopes = tuple(whole.gradients[index] for index in order)
        return replace(whole, sources=tuple(sources), values=values, gradients=slopes)

    @cached_property
    def _whole(self) -> Tail:
        """The tail with the sources in the order of the graph."""
        return self._tail(self.graph.sources, self._find_terms)

    def _tail(
        self,
        sources: Sequence[Edge],
        terms: Callable[[], tuple[Term, ...]],
        by: Collection[Edge] = (),
    ) -> Tail:
        """See `tail`.

        Args:
            sources: All sources.
            terms: Returns the terms.
            by: Tensors by which all sources enter the loss, and which take their place. The
                result is that close to them: selections, as of a maximum, stay.
        """
        calls = [
            call
            for call in self._calls
            if call in self._rules.registered or call.needs_module(self.graph.nonlinear)
        ]
        results = {call.edge: call for call in calls}
        hidden = {node for call in calls for node in call.nodes}
        single = {node for node in self.graph.nonlinear if node not in hidden}
        nodes = self.graph.nodes
        if by:
            calls, results, nodes = [], {}, dependents(self.graph.root, lambda edge: edge in by)
            single = {
                each for each in nodes if each in self.graph.nonlinear and not is_selection(each)
            }
        own = Repeated(self.graph.nodes, self.graph.depends, self.graph.output)

        def stops(edge: Edge) -> bool:
            return edge in by or edge[0] in single or edge in results or self.graph.is_source(edge)

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
            tuple(zeros_at(edge) if edge in by else self.graph.value(edge) for edge in sources),
            tuple(self.graph.gradients.get(edge) for edge in sources),
            self.loss,
            self.weight,
            terms,
            tuple(operations),
            LinearMap(self.graph.root, self.graph.nodes, stops),
            () if by else self._policies(stops),
        )

    def _policies(self, stops: Stops) -> tuple[Policy, ...]:
        """Return the policies of a policy gradient; for ``stops`` see `policies_of`."""
        own = self._without.magnitudes, self._without.samples, self._rules.terms
        return tuple(policies_of(*own, self.graph, stops))

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
            examples = example_of_units(term, values, self.graph.unbatched, device)
            for root, is_alone in term.roots(examples):
                yield self.graph.at_ends(term.gradients(root)), is_alone

    @cached_property
    def _find_terms(self) -> FoundTerms:
        """What finds the terms, also after the graph is freed."""
        graph, terms = self.graph, self._rules.terms
        starts = [edge for term in terms for edge in term.argument]
        bare = graph.ends.keys() - first_met(starts, graph.is_end)
        ends = {
            edge: (graph.map_to(edge), gradient)
            for edge, gradient in graph.ends.items()
            if gradient.ndim and (edge in bare or not graph.inner)
        }
        own = self._hessians(), ends, self._without, self._rules.left_out(), self._account
        return FoundTerms(*own, graph.unbatched, self._replaced())

    @cached_property
    def _samples(self) -> list[Term]:
        """The samples of a policy whose information takes the place of other curvature."""
        return [term for term in self._without.samples if not is_known(term)]

    def _replaced(self) -> set[int]:
        """Return what identifies the terms of operations that samples of a policy consist of."""
        given = self.graph.is_source
        nodes = {node for term in self._samples for node in dependents(term.argument[0], given)}
        return {id(term) for node, term in self._rules.by_node.items() if node in nodes}

    @cached_property
    def _without(self) -> WithoutCurvature:
        """The operations next to the loss without curvature of their own."""
        known = {*self._rules.curved, *self._rules.inner}
        return WithoutCurvature.of(self.graph, known, (self.loss * self.weight).sum())

    def _hessians(self) -> Callable[[], Sequence[Term]]:
        """Return a function that takes Hessians where rules of operations do not give them."""
        graph, rules, nonlinear = self.graph, self._rules, set(self.graph.nonlinear)
        if rules.registered or graph.inner:
            return lambda: rules.terms
        lacks = may_lack(graph.root, nonlinear, rules.curved, rules.joined)
        compared = self._compared() if lacks or Distributions.end(graph) else None
        other = self._other_hessians() if lacks else lambda: rules.terms
        return other if compared is None else lambda: compared() or other()

    def _other_hessians(self) -> Callable[[], Sequence[Term]]:
        """Return a function that takes Hessians by single tensors, or by the outputs."""
        graph, terms = self.graph, self._rules.terms
        given = graph.root, set(graph.nonlinear), graph.is_source
        found = list[tuple[Tail, dict[Edge, LinearMap]]]()
        for by in arguments(*given):
            tail = self._tail([*by], tuple, by)
            if not tail.unknown():
                found.append((tail, {edge: graph.map_to(edge) for edge in by}))
        if found:
            return partial(by_arguments, terms, found, graph.outputs, bool(graph.unbatched))
        tail = self._tail(graph.sources, tuple)
        sampled = {edge for term in self._samples for edge in term.sources}
        outputs = [edge for edge in graph.outputs if edge not in sampled]
        return partial(with_hessians, terms, tail, outputs, graph.unbatched)

    def _compared(self) -> Callable[[], Sequence[Term] | None] | None:
        """Return a function that takes the curvature of distributions that the loss compares.

        ``None`` without such, or if the rules of operations give their curvature; it returns
        ``None`` if the loss is another function of them.
        """
        graph, rules, known = self.graph, self._rules, Distributions.of(self.graph)
        given = graph.root, set(graph.nonlinear), rules.curved, rules.joined
        if known is None or not (
            may_lack(*given, known.nodes) or known.has_logarithms(rules.joined)
        ):
            return None
        tail = self._tail(known.edges, tuple, known.edges)
        if tail.unknown():
            return None
        find = known.term(graph, tail)
        others = [term for node, term in rules.by_node.items() if node not in known.nodes]

        def compared() -> Sequence[Term] | None:
            found = find()
            return None if found is None else [*others, found]

        return compared
