"""Nonlinear operations of a graph, as they can be evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.losses.snapshot import copied
from einconv_kfac.curvature.objective.frozen_shifts import frozen_shift
from einconv_kfac.curvature.objective.graph import (
    Edge,
    NodeOrder,
    Stops,
    inputs_of,
    kind_of_node,
    zeros_at,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes.reductions import fixed_selection, is_selection
from einconv_kfac.curvature.objective.positive_parts import before_positive_part, follows
from einconv_kfac.curvature.objective.recorded_results import Known, recorded_result
from einconv_kfac.curvature.objective.shared_memory import as_recorded
from einconv_kfac.curvature.objective.tail import Operation


class Repeated(NamedTuple):
    """What operations between a model's outputs and a loss are evaluated again from.

    Args:
        nodes: The operations, in forward order.
        depends: Whether a tensor depends on the model.
        output: Returns the recorded value of a model's output at an edge.
    """

    nodes: NodeOrder
    depends: Callable[[Edge], bool]
    output: Callable[[Edge], Tensor | None]


def operation_of(node: Node, own: Repeated, stops: Stops) -> Operation:
    """Return a nonlinear operation as it can be evaluated again.

    Args:
        node: The operation.
        own: The operations that it belongs to.
        stops: Whether its inputs are given at an edge.
    """
    kind, edges = kind_of_node(node), inputs_of(node)
    maps = [
        LinearMap(e, own.nodes, stops) if e is not None and own.depends(e) else None for e in edges
    ]
    rule = NODE_RULES.get(kind)
    output = (node, 0 if rule is None else rule.output)
    if rule is None or any(maps[len(rule.inputs(node)) :]) or _has_others(output, own.nodes):
        return Operation(kind, (node, 0), tuple((None, each) for each in maps), None)
    values = [
        _value_before(node, edge, own) if value is None and edge is not None else value
        for value, edge in zip(rule.inputs(node), chain(edges, repeat(None)))
    ]
    maps += [None] * (len(values) - len(maps))
    values = [
        copied(value) if map_ is None else _now(value, edge)
        for value, map_, edge in zip(values, maps, chain(edges, repeat(None)))
    ]
    function = rule.function(node)
    if is_selection(node) and edges[0] is not None and values[0] is None:
        values, function = [zeros_at(edges[0])], fixed_selection(node)
    if isinstance(function, partial):
        options = {name: copied(own) for name, own in function.keywords.items()}
        function = partial(function.func, *function.args, **options)
    return Operation(kind, output, tuple(zip(values, maps)), function)


def _now(value: Tensor | None, edge: Edge | None) -> Tensor | None:
    """Return an input that depends on the model as it is now, see `as_recorded`."""
    return value if value is None or edge is None else as_recorded(value, edge)


def _has_others(output: Edge, nodes: NodeOrder) -> bool:
    """Return whether operations use other outputs of the same operation."""
    node, index = output
    if len(node._input_metadata) == 1:
        return False
    used = {edge for each in nodes for edge in inputs_of(each) if edge is not None}
    return any((node, i) in used for i in range(len(node._input_metadata)) if i != index)


def _value_before(node: Any, edge: Edge, own: Repeated) -> Tensor | None:
    """Return an input that a node does not save: an output, or the result of an operation."""
    value, result = own.output(edge), getattr(node, "_saved_result", None)
    if value is not None:
        is_overwritten = result is not None and result.data_ptr() == value.data_ptr()
        return None if is_overwritten else value
    if result is None or kind_of_node(node) != "Relu":
        return recorded_result(edge, Known(own.output))
    result = result.detach()
    found = recorded_result(edge, Known(own.output, frozen_shift))
    if found is not None and follows(result, found):
        return found
    unshifted = recorded_result(edge, Known(own.output, frozen_shift, leaves_out_constants=True))
    return None if unshifted is None else before_positive_part(result, unshifted)
