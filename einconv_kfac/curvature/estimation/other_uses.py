"""Uses of weights past the calls of their layers, found in the autograd graph.

The factors of a layer describe its calls. A weight may be used elsewhere as well: transposed, in
a function (``functional.linear(z, layer.weight.t())``), in a derivative of the network that
the forward pass takes (``torch.autograd.grad(u, x, create_graph=True)``), or in a tensor that
``torch.func.functional_call`` puts in its place. In the graph of the outputs, every path from a
parameter must then lead to the output of a recorded call before it meets any other operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.stored import graph_leaf


def used_past_calls(
    outputs: Sequence[Tensor | GradientEdge], calls: Sequence[LayerCall], layers: Iterable[Layer]
) -> set[str]:
    """Return the names of the layers whose parameters the outputs use past the calls.

    Args:
        outputs: Outputs of the model, or their gradient edges.
        calls: The recorded calls, of any layers.
        layers: The layers to look for.
    """
    roots = [o.node if isinstance(o, GradientEdge) else o.grad_fn for o in outputs]
    consumers = _consumers([node for node in roots if node is not None])
    leaves = {id(v): n for n in consumers if (v := getattr(n, "variable", None)) is not None}
    by_module: dict[int, list[LayerCall]] = defaultdict(list)
    for call in calls:
        by_module[id(call.module)].append(call)
    found = set()
    for layer in layers:
        own = [call for module in layer.modules for call in by_module[id(module)]]
        starts = [
            leaves[id(p)] for own in layer.tensors().values() if id(p := graph_leaf(own)) in leaves
        ]
        are_own = all(call.has_parameters for call in own if call.output.node in consumers)
        if not (are_own and _all_lead_to(starts, own, consumers, set(roots))):
            found.add(layer.name)
    return found


def _consumers(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """Return the nodes of a graph, each with the nodes that take its result."""
    found: dict[Node, list[Node]] = {root: [] for root in roots}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if parent not in found:
                found[parent] = []
                waiting.append(parent)
            found[parent].append(node)
    return found


def _all_lead_to(
    starts: Iterable[Node],
    calls: Sequence[LayerCall],
    consumers: dict[Node, list[Node]],
    roots: set[Node | None],
) -> bool:
    """Return whether every path from some nodes stays inside of calls up to their outputs."""
    ends = {call.output.node for call in calls}
    inside = {node for call in calls for node in nodes_inside(call)}
    seen, waiting = set(), list(starts)
    while waiting:
        node = waiting.pop()
        if node in roots:
            return False
        for consumer in consumers[node]:
            if consumer in ends or consumer in seen:
                continue
            if consumer not in inside:
                return False
            seen.add(consumer)
            waiting.append(consumer)
    return True


def nodes_inside(call: LayerCall) -> set[Node]:
    """Return the nodes between the input and the output of a call, and its parameters."""
    if call.source is None:
        stops: set[Node | None] = {None}
    else:  # a rule may record an input that it made of those of the module
        stops = {None, call.source, *(node for node, _ in call.source.next_functions)}
    found: set[Node] = {call.output.node}
    waiting = [call.output.node]
    while waiting:
        for parent, _ in waiting.pop().next_functions:
            if parent is not None and parent not in stops and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found
