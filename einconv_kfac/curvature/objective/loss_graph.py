"""The graph of a loss down to the outputs of a model, and what lies on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd.graph import Node

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
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.nodes.slices import is_affine
from einconv_kfac.curvature.objective.shared_memory import as_recorded
from einconv_kfac.curvature.objective.unbatched import LayerOutput, unbatched_of
from einconv_kfac.curvature.objective.units import drawn

Values = Callable[[Edge], "Tensor | None"]
"""Returns the recorded value of a model's output at an edge, or ``None`` for another edge."""


class LossGraph:
    """The operations between the outputs of a model and a loss.

    Args:
        root: The edge of the loss.
        weight: The weight of each number of the loss.
        output: Returns the value of a model's output at an edge, ``None`` elsewhere.
        parameters: The parameters of the model, whose values a loss may use itself.
        layers: The outputs of calls of layers.

    Attributes:
        root: The edge of the loss.
        nodes: The operations, from the loss to the outputs.
        nonlinear: Those that are not linear in what depends on the model.
        seen: The gradients at the edges between loss and outputs.
        gradients: The gradients at the sources.
        sources: Edges of the outputs and parameters that the loss depends on.
        outputs: Those that are outputs.
        inner: The outputs of layers that the loss depends on past the outputs of the model.
        ends: The gradients at the outputs of the model and of these layers.
        unbatched: Those of them without a dimension of examples.
    """

    def __init__(
        self,
        root: Edge,
        weight: Tensor,
        output: Values,
        parameters: Mapping[Tensor, str],
        layers: Mapping[Edge, LayerOutput] = MappingProxyType({}),
    ) -> None:
        self.root = root
        self.output, self._parameters = output, parameters
        self._is_source: dict[Edge, bool] = {}
        self.nodes = dependents(root, self.is_source)
        self.seen: dict[Edge, Tensor] = {}
        with torch.no_grad():
            start = {root: weight}
            self.gradients = backpropagated(start, self.nodes, self.is_source, self.seen)
        self.sources = list(self.gradients)
        self.outputs = [edge for edge in self.sources if output(edge) is not None]
        self.inner = {edge for edge in layers if edge[0] in self.nodes and edge != root}
        self.ends = {edge: self.gradients[edge] for edge in self.outputs}
        if self.inner:
            self.ends = dict.fromkeys([*self.outputs, *self.inner], weight)
            found = self.at_ends(start)
            self.ends = {edge: found[edge] for edge in self.ends if edge in found}
        self.unbatched = unbatched_of(self.ends, layers)
        self.nonlinear = [node for node in self.nodes if not self._is_linear(node)]

    def derivatives(self) -> list[str]:
        """Return the derivatives of operations that the loss depends on, if they use parameters.

        They come from derivatives of the model that were taken between its output and the loss.
        """
        if len(self.sources) == len(self.outputs):
            return []
        kinds = {node: kind_of_node(node) for node in self.nodes}
        found = {node: kind for node, kind in kinds.items() if kind.endswith("Backward")}
        return sorted({kind for node, kind in found.items() if self._uses_parameters(node)})

    def _uses_parameters(self, node: Node) -> bool:
        """Return whether an operation depends on parameters past the outputs of the model."""
        starts = [edge for edge in inputs_of(node) if edge is not None]
        return any(leaf_of(edge) is not None for edge in first_met(starts, self.is_source))

    def past(self, ends: Collection[Node]) -> set[Node]:
        """Return the operations on the way to parameters that are neither sources nor ends."""
        return {*dependents(self.root, lambda e: e[0] in ends or self.is_source(e))}

    def linear_part(self) -> dict[Edge, Tensor]:
        """Return the gradients of what is linear in the first nonlinear results and in ends."""
        nonlinear = {*self.nonlinear}
        start = {self.root: self.seen[self.root]}
        with torch.no_grad():
            return backpropagated(
                start, self.nodes, lambda edge: edge[0] in nonlinear or self.is_end(edge)
            )

    def before(self, nodes: Iterable[Node]) -> set[Node]:
        """Return the operations that some operations take results of, down to the sources."""
        starts = [edge for node in nodes for edge in inputs_of(node) if edge is not None]
        found: set[Node] = set()

        def stops(edge: Edge) -> bool:
            if not (is_end := self.is_source(edge)):
                found.add(edge[0])
            return is_end

        first_met(starts, stops)
        return found

    def derivative(self) -> LinearMap:
        """Return the derivative of the loss by its sources."""
        return self.map_to(self.root)

    def map_to(self, edge: Edge) -> LinearMap:
        """Return the derivative of a tensor by the sources."""
        return LinearMap(edge, self.nodes, self.is_source)

    def at_ends(self, start: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        """Return gradients of the graph as gradients at the ends."""
        stopped = {edge: g for edge, g in start.items() if self.is_end(edge)}
        inner = {
            edge: g.to(metadata_of(edge).dtype) for edge, g in start.items() if edge not in stopped
        }
        with torch.no_grad():
            found = backpropagated(inner, self.nodes, self.is_end)
        for edge, gradient in stopped.items():
            own = gradient.to(metadata_of(edge).dtype)
            found[edge] = found[edge] + own if edge in found else own
        return {edge: g for edge, g in found.items() if edge in self.ends}

    def is_end(self, edge: Edge) -> bool:
        """Return whether an edge is a source, or the output of a layer past the outputs."""
        return edge in self.inner or self.is_source(edge)

    def is_source(self, edge: Edge) -> bool:
        """Return whether an edge is an output of the model or one of its parameters."""
        known = self._is_source.get(edge)
        if known is None:
            leaf = leaf_of(edge)
            is_own = self.output(edge) is not None if leaf is None else leaf in self._parameters
            known = self._is_source[edge] = edge != self.root and is_own
        return known

    def depends(self, edge: Edge | None) -> bool:
        """Return whether a tensor depends on the model."""
        return edge is not None and (edge[0] in self.nodes or self.is_source(edge))

    def value(self, edge: Edge) -> Tensor:
        """Return the recorded value of a source."""
        value = self.output(edge)
        if value is not None:
            return as_recorded(value, edge)
        leaf = leaf_of(edge)
        assert leaf is not None
        return leaf.detach().clone()

    def are_same(self, first: Edge, second: Edge) -> bool:
        """Return whether two tensors of equal value have the same derivative by the sources."""
        ends = [self.map_to(edge) for edge in (first, second)]
        random = {e: drawn(self.value(e), seed) for seed, e in enumerate(self.sources)}
        left, right = (each(random) for each in ends)
        return left is not None and right is not None and torch.allclose(left, right)

    def are_apart(self, first: Edge, second: Edge) -> bool:
        """Return whether two tensors depend on different entries of the sources."""
        one, other = (
            self.map_to(edge).transposed(drawn(zeros_at(edge), seed))
            for seed, edge in enumerate((first, second))
        )
        shared = one.keys() & other.keys()
        return not any(bool(((one[e] != 0) & (other[e] != 0)).any()) for e in shared)

    def _is_linear(self, node: Node) -> bool:
        """Return whether an operation is linear in what depends on the model."""
        return is_linear(node, self.depends)


def is_linear(node: Node, depends: Callable[[Edge | None], bool]) -> bool:
    """Return whether an operation is linear in those of its inputs that depend on something.

    Args:
        node: The operation.
        depends: Whether an input does; ``None`` stands for a constant.
    """
    kind = kind_of_node(node)
    if kind in LINEAR:
        return kind != "CopySlices" or is_affine(node)
    return kind in NODE_RULES and NODE_RULES[kind].is_linear([*map(depends, inputs_of(node))])
