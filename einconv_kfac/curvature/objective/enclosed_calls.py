"""The calls of loss modules in the graph of a loss, with the operations that they consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    NodeOrder,
    Stops,
    dependents,
    kind_of_node,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.loss_calls import LossCall
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.node_rule import NodeRule
from einconv_kfac.curvature.objective.nodes.reductions import is_selection
from einconv_kfac.curvature.objective.tail import Operation

CallAt = Callable[[Edge], "LossCall | None"]
"""Returns the call of a loss module whose result is at an edge, or ``None``."""


def no_call(_: Edge) -> None:
    """Return ``None``."""


@dataclass(frozen=True)
class EnclosedCall:
    """A call of a loss module that depends on the model through its first argument alone.

    Args:
        call: The call.
        edge: The edge of its result.
        nodes: The operations between the argument and the result.
    """

    call: LossCall
    edge: Edge
    nodes: frozenset[Node]

    def operation(self, nodes: NodeOrder, stops: Stops) -> Operation:
        """Return the call as one operation; see `LinearMap` for the arguments."""
        map_ = LinearMap(self.call.argument, nodes, stops)
        kind = type(self.call.loss_fn).__name__
        return Operation(kind, self.edge, ((self.call.value, map_),), self.call)

    def needs_module(self, nonlinear: Sequence[Node]) -> bool:
        """Return whether the module has to be called to evaluate the loss, and can be.

        That is so if one of its operations cannot be evaluated again.
        """
        own = [node for node in nonlinear if node in self.nodes]
        return any(not _is_known(node) for node in own) and self.call.is_repeated()


def enclosed_calls(nodes: NodeOrder, call_at: CallAt, is_source: Stops) -> list[EnclosedCall]:
    """Return the calls of loss modules among operations, in forward order.

    Args:
        nodes: The operations, in forward order.
        call_at: Returns the call at an edge.
        is_source: Whether an edge is an output of the model or a parameter.
    """
    found = []
    for node in nodes:
        for index in range(len(node._input_metadata)):
            call = call_at((node, index))
            if call is not None and call.is_intact:
                inner = _nodes_of(call, (node, index), is_source)
                found += [EnclosedCall(call, (node, index), frozenset(inner))] if inner else []
    return found


def _nodes_of(call: LossCall, edge: Edge, is_source: Stops) -> Iterable[Node]:
    """Return the operations of a call; none if it depends on the model in another way."""
    others: list[Edge] = []

    def stops(each: Edge) -> bool:
        if each == call.argument:
            return True
        if is_source(each):
            others.append(each)
        return is_source(each)

    inner = dependents(edge, stops)
    return [] if others else inner


def _is_known(node: Node) -> bool:
    """Return whether an operation can be evaluated for other inputs, with another selection."""
    rule: NodeRule | None = NODE_RULES.get(kind_of_node(node))
    if rule is None or rule.function(node) is None or is_selection(node):
        return False
    return all(value is not None for value in rule.inputs(node))
