"""Reading a loss: a walk from the loss to the outputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
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
    backpropagated,
    dependents,
    first_met,
    inputs_of,
    kind_of_node,
    leaf_of,
    metadata_of,
    zeros_at,
)
from einconv_kfac.curvature.objective.hessian import (
    hessian_by,
    is_selection,
    may_lack,
    only_argument,
    with_hessians,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Empirical, LocalCurvature
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.nodes.slices import is_assignment
from einconv_kfac.curvature.objective.nodes.squares import squared
from einconv_kfac.curvature.objective.repeated_operation import Repeated, operation_of
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.units import drawn, example_of_units

Values = Callable[[Edge], "Tensor | None"]
"""Returns the recorded value of a model's output at an edge, or ``None`` for another edge."""


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

    Attributes:
        root: The edge of the loss.
        loss: The loss, detached.
        weight: The weight of each number in the loss.
        sources: Edges of the outputs and parameters that the loss depends on.
        outputs: Those that are outputs.
        ends: The gradients of the loss at the outputs, and at outputs of layers that the loss
            depends on past these, by edge.
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
    ) -> None:
        self.loss, self.weight, self.root = loss, weight, root
        self._output, self._parameters = output, parameters
        self._nodes = dependents(self.root, self._is_source)
        with torch.no_grad():
            self._seen: dict[Edge, Tensor] = {}
            start = {self.root: weight}
            self._gradients = backpropagated(start, self._nodes, self._is_source, self._seen)
        self.sources = list(self._gradients)
        self.outputs = [edge for edge in self.sources if output(edge) is not None]
        nodes = set(self._nodes)
        self._inner = {edge for edge in layers if edge[0] in nodes and edge != self.root}
        self.ends = {edge: self._gradients[edge] for edge in self.outputs}
        if self._inner:
            self.ends = dict.fromkeys([*self.outputs, *self._inner], weight)
            found = self._at_ends(start)
            self.ends = {edge: found[edge] for edge in self.ends if edge in found}
        self._nonlinear = [node for node in self._nodes if not self._is_linear(node)]
        self._calls = enclosed_calls(self._nodes, call_at, self._is_source)
        self._terms = [*self._registered_terms()]
        self._terms += [*self._curved_terms()]
        self._take_hessians_()
        self._terms += [*self._empirical_terms()]

    def tail(self, sources: Sequence[Edge], *, by: Edge | None = None) -> Tail:
        """Return what remains of the reading after the graph is freed.

        Args:
            sources: All sources in the order in which the tail takes them.
            by: A tensor by which all sources enter the loss, and which takes their place. The
                result is that close to it: selections, as of a maximum, stay.
        """
        calls = [
            call
            for call in self._calls
            if call in self._registered or call.needs_module(self._nonlinear)
        ]
        results = {call.edge: call for call in calls}
        hidden = {node for call in calls for node in call.nodes}
        single = {node for node in self._nonlinear if node not in hidden}
        nodes = self._nodes
        if by is not None:
            calls, results, nodes = [], {}, dependents(self.root, lambda edge: edge == by)
            single = {each for each in nodes if each in self._nonlinear and not is_selection(each)}
        own = Repeated(self._nodes, self._depends, self._output)

        def stops(edge: Edge) -> bool:
            return edge == by or edge[0] in single or edge in results or self._is_source(edge)

        operations = [
            result
            for node in nodes
            for result in (
                *([operation_of(node, own, stops)] if node in single else ()),
                *(c.operation(self._nodes, stops) for c in calls if c.edge[0] is node),
            )
        ]
        return Tail(
            tuple(sources),
            tuple(zeros_at(edge) if edge == by else self._value(edge) for edge in sources),
            tuple(self._gradients.get(edge) for edge in sources),
            self.loss,
            self.weight,
            tuple(self._terms),
            tuple(operations),
            LinearMap(self.root, self._nodes, stops),
        )

    def derivatives(self) -> list[str]:
        """Return the derivatives of operations that the loss depends on, if it uses parameters.

        They come from derivatives of the model that were taken between its output and the loss.
        """
        if len(self.sources) == len(self.outputs):
            return []
        return sorted({k for node in self._nodes if (k := kind_of_node(node)).endswith("Backward")})

    def past(self, ends: Collection[Node]) -> set[Node]:
        """Return the operations on the way to parameters that are neither sources nor ends."""
        return {*dependents(self.root, lambda e: e[0] in ends or self._is_source(e))}

    def derivative(self) -> LinearMap:
        """Return the derivative of the loss by its sources."""
        return LinearMap(self.root, self._nodes, self._is_source)

    def sample(self, generator: Generator) -> dict[Edge, Tensor]:
        """Draw gradients at the ends whose second moment is the curvature of the loss."""
        start: dict[Edge, Tensor] = {}
        for term in self._terms:
            for edge, root in term.gradients(term.sample(generator)).items():
                start[edge] = start[edge] + root if edge in start else root
        return self._at_ends(start)

    def roots(self) -> Iterator[dict[Edge, Tensor]]:
        """Yield gradients at the ends whose outer products sum to the curvature.

        Each touches one unit (a class score vector, an entry) of every example.
        """
        values = {edge: self._value(edge) for edge in self.outputs}
        device = next(iter(self._gradients.values())).device
        for term in self._terms:
            for root in term.roots(example_of_units(term, values, device)):
                yield self._at_ends(term.gradients(root))

    def _at_ends(self, start: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        """Return gradients of the graph as gradients at the ends."""
        stopped = {edge: g for edge, g in start.items() if self._is_end(edge)}
        inner = {
            edge: g.to(metadata_of(edge).dtype) for edge, g in start.items() if edge not in stopped
        }
        with torch.no_grad():
            found = backpropagated(inner, self._nodes, self._is_end)
        for edge, gradient in stopped.items():
            own = gradient.to(metadata_of(edge).dtype)
            found[edge] = found[edge] + own if edge in found else own
        return {edge: g for edge, g in found.items() if edge in self.ends}

    def _is_end(self, edge: Edge) -> bool:
        """Return whether an edge is a source, or the output of a layer past the outputs."""
        return edge in self._inner or self._is_source(edge)

    def _is_source(self, edge: Edge) -> bool:
        """Return whether an edge is an output of the model or one of its parameters."""
        if edge == self.root:
            return False
        leaf = leaf_of(edge)
        return self._output(edge) is not None if leaf is None else leaf in self._parameters

    def _depends(self, edge: Edge | None) -> bool:
        """Return whether a tensor depends on the model."""
        return edge is not None and (edge[0] in self._nodes or self._is_source(edge))

    def _is_linear(self, node: Node) -> bool:
        """Return whether an operation is linear in what depends on the model."""
        kind = kind_of_node(node)
        if kind in LINEAR:
            return kind != "CopySlices" or is_assignment(node)
        dependent = [self._depends(edge) for edge in inputs_of(node)]
        return kind in NODE_RULES and NODE_RULES[kind].is_linear(dependent)

    def _value(self, edge: Edge) -> Tensor:
        """Return the recorded value of a source."""
        value = self._output(edge)
        if value is not None:
            return value
        leaf = leaf_of(edge)
        assert leaf is not None
        return leaf.detach().clone()

    def _registered_terms(self) -> Iterator[Term]:
        """Yield the terms of loss modules with a rule that a user registered."""
        self._registered: list[EnclosedCall] = []
        for each in self._calls:
            curvature = each.call.curvature(self._seen[each.edge])
            if curvature is not None:
                self._registered.append(each)
                argument = each.call.argument
                jacobian = LinearMap(argument, self._nodes, self._is_source)
                yield Term((argument,), (jacobian,), curvature)

    def _curved_terms(self) -> Iterator[Term]:
        """Yield the terms whose curvature is positive semi-definite."""
        hidden = {node for call in self._registered for node in call.nodes}
        self._curved: set[Node] = set()
        for node in (each for each in self._nonlinear if each not in hidden):
            rule, weight = NODE_RULES.get(kind_of_node(node)), self._seen.get((node, 0))
            if rule is None or weight is None:
                continue
            square, values = squared(node, weight, self._is_same), rule.inputs(node)
            own = inputs_of(node)[: len(values)], rule.curvature(node, values, weight)
            argument, curvature = own if square is None else square
            if curvature is not None:
                self._curved.add(node)
                yield self._term(argument, curvature)

    def _is_same(self, first: Edge, second: Edge) -> bool:
        """Return whether two tensors of equal value have the same derivative by the sources."""
        ends = [LinearMap(edge, self._nodes, self._is_source) for edge in (first, second)]
        random = {e: drawn(self._value(e), seed) for seed, e in enumerate(self.sources)}
        left, right = (each(random) for each in ends)
        return left is not None and right is not None and torch.allclose(left, right)

    def _term(self, argument: Iterable[Edge | None], curvature: LocalCurvature) -> Term:
        """Return a term by its argument, of which constants are left out."""
        edges = tuple(edge for edge in argument if edge is not None and self._depends(edge))
        maps = tuple(LinearMap(edge, self._nodes, self._is_source) for edge in edges)
        return Term(edges, maps, curvature)

    def _take_hessians_(self) -> None:
        """Take the Hessian by an output where rules of operations do not give it."""
        is_read = not self._registered and not self._inner
        if is_read and may_lack(self.root, set(self._nonlinear), self._curved):
            by = only_argument(self.root, set(self._nonlinear), self._is_source)
            if by is not None and not (tail := self.tail([by], by=by)).unknown():
                known = self._terms if by in self.outputs else ()
                found = hessian_by(tail, by, known)
                self._terms = self._terms if found is None else [self._term([by], found)]
            else:
                self._terms = with_hessians(self._terms, self.tail(self.sources), self.outputs)

    def _empirical_terms(self) -> Iterator[Term]:
        """Yield the empirical Fisher at the ends that no other term gives curvature."""
        curved = {edge for term in self._terms for edge in term.sources}
        if self._inner:
            starts = [edge for term in self._terms for edge in term.argument]
            curved |= first_met(starts, self._is_end)
        for edge, gradient in self.ends.items():
            if edge not in curved and gradient.ndim:
                identity = LinearMap(edge, self._nodes, self._is_source)
                yield Term((edge,), (identity,), Empirical(gradient))
