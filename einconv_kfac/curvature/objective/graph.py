"""Edges of the autograd graph: their marks, their order, and backward passes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from einconv_kfac.curvature.objective.alignment_gradients import alignment_gradients
from einconv_kfac.curvature.objective.distance_gradients import distance_gradients
from einconv_kfac.torch_versions import gradient_edge

Edge: TypeAlias = tuple[Node, int]
"""A node and the index of one of its forward outputs: one tensor of the graph."""
Stops: TypeAlias = Callable[[Edge], bool]
"""Returns whether a walk through the graph ends at an edge."""
NodeOrder: TypeAlias = Mapping[Node, int]
"""The positions of nodes in forward order; it is iterated over in this order."""
_KEY = "einconv_kfac"
_INSIDE = "inside"
WRAPPER = "_DDPSink"
"""The function that `DistributedDataParallel` may insert after its module. A backward pass through
its node is the beginning of the one that averages gradients, and there must be no other."""
FUNCTION = "autograd.Function "
"""The prefix of the kinds of nodes that are functions written in Python."""
_STEPS = {f"{kind}Backward" for kind in ("Sign", "Round", "Floor", "Ceil", "Trunc")}
"""Operations of torch, not of users, that are constant in pieces: results count as constants."""
_IDENTITIES = ("BackwardHookFunction", WRAPPER)
"""Python functions that return their inputs; torch also inserts them for backward hooks."""
_COMPILED = (
    "The loss must be computed without `torch.compile`, got a compiled function between the "
    "model's output, or its parameters, and the loss. Compiled code frees what its backward pass "
    "needs, so that the dependence of the loss on the model cannot be read. Call this function "
    "uncompiled. A compiled model is no obstacle: write `model = torch.compile(model)` in place of "
    "`model.compile()`, pass that to KFAC, and call it."
)


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge of a tensor that requires gradients."""
    edge = gradient_edge(tensor)
    return edge.node, edge.output_nr


def viewed(tensor: Tensor) -> Tensor:
    """Return the tensor that another one is a view of, if it has the same entries in this order.

    It is the tensor itself where there is none. The output of a linear layer with positions is a
    view of a product. What overwrites a view in place takes its node out of the graph, but not
    that of the product.
    """
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not base.requires_grad:
        return tensor
    return base if base.is_contiguous() and tensor.is_contiguous() else tensor


def mark_(tensor: Tensor, owner: object, mark: object) -> None:
    """Attach a mark to a tensor's edge.

    The graph owns the mark, so that a mark keeps no graph alive. It must not refer to the graph.

    Args:
        tensor: A tensor that requires gradients.
        owner: Identifies the kind of mark; an edge may have several.
        mark: The mark.
    """
    node, index = edge_of(tensor)
    _metadata(node).setdefault(_KEY, {})[owner, index] = mark


def mark_of(edge: Edge, owner: object) -> Any:
    """Return the mark of an owner at an edge, or ``None``."""
    marks = _metadata(edge[0]).get(_KEY)
    return None if marks is None else marks.get((owner, edge[1]))


def has_marks(edge: Edge) -> bool:
    """Return whether any tensor of an edge's node has marks, which hardly one has."""
    return _KEY in _metadata(edge[0])


def _metadata(node: Node) -> dict[str, Any]:
    """Return what is attached to a node; torch declares it as a method."""
    found: Any = node.metadata
    own: dict[str, Any] = found
    return own


def passed_on_(tensor: Tensor, inner: Edge) -> None:
    """Note that a wrapper around a model passed a tensor on, from an edge inside of the model."""
    if edge_of(tensor) != inner:
        mark_(tensor, _INSIDE, inner)


def within(edge: Edge) -> Edge:
    """Return the edge inside of a model that a wrapper passed on, or else the edge itself."""
    found: Edge | None = mark_of(edge, _INSIDE)
    return edge if found is None else found


def leaf_of(edge: Edge) -> Tensor | None:
    """Return the leaf tensor whose gradient is accumulated at the edge, or ``None``."""
    leaf: Tensor | None = getattr(edge[0], "variable", None)
    return leaf


def kind_of_node(node: Node) -> str:
    """Return the name of a node's operation, without the last ``Backward`` and its number.

    The derivative of an operation is another one. Functions that are written in Python have a
    prefix, so that they are not taken for operations of torch.
    """
    name = node.name().rpartition("::")[2]
    kind = name.rpartition("Backward")[0] or name
    is_own = isinstance(node, BackwardCFunction) and kind not in _IDENTITIES
    return FUNCTION + kind if is_own else kind


def inputs_of(node: Node) -> list[Edge | None]:
    """Return the edges of the inputs of a node's operation; ``None`` for constants.

    The inputs of an operation that is constant in pieces count as such.
    """
    edges: Any = node.next_functions
    if node.name()[:-1] in _STEPS:
        return [None] * len(edges)
    return [None if edge[0] is None else edge for edge in edges]


def dependents(root: Edge, stops: Stops) -> NodeOrder:
    """Return the nodes below a root that depend on an edge where the walk stops, in forward order.

    Args:
        root: The edge from which the graph is walked; the walk does not stop there.
        stops: Whether the walk stops at an edge.
    """
    depends: dict[Node, bool] = {}
    ordered: dict[Node, int] = {}
    stack: list[tuple[Node, list[Node] | None]] = [(root[0], None)]
    while stack:
        node, parents = stack.pop()
        if parents is not None:  # all of them are done
            if depends[node] or any(map(depends.__getitem__, parents)):
                depends[node] = True
                ordered[node] = len(ordered)
        elif node not in depends:
            edges = [edge for edge in inputs_of(node) if edge is not None]
            parents = [edge[0] for edge in edges if not stops(edge)]
            depends[node] = len(parents) < len(edges)
            stack.append((node, parents))
            stack += [(parent, None) for parent in parents]
    return ordered


def first_met(starts: Iterable[Edge], stops: Stops) -> set[Edge]:
    """Return the edges at which a walk through the graph ends.

    Args:
        starts: Where it begins.
        stops: Whether it ends at an edge.
    """
    found: set[Edge] = set()
    seen: set[Node] = set()
    waiting = list(starts)
    while waiting:
        edge = waiting.pop()
        if stops(edge):
            found.add(edge)
        elif edge[0] not in seen:
            seen.add(edge[0])
            waiting += [each for each in inputs_of(edge[0]) if each is not None]
    return found


def backpropagated(
    start: Mapping[Edge, Tensor],
    nodes: NodeOrder,
    stops: Stops,
    seen: dict[Edge, Tensor] | None = None,
) -> dict[Edge, Tensor]:
    """Return the gradients at the edges where a backward pass stops, summed over all paths.

    Nodes are called one by one, so that neither hooks nor ``.grad`` take part. With gradients
    enabled the result has a graph of its own.

    Args:
        start: Gradients at edges where the pass begins.
        nodes: Nodes in the order of `dependents`; others are constants.
        stops: Whether the pass stops at an edge.
        seen: Receives the gradients at all other edges.
    """
    gradients: dict[Edge, Tensor] = dict(start)
    found: dict[Edge, Tensor] = {}
    waiting = {edge[0] for edge in start if edge[0] in nodes}
    heap = [(-nodes[node], node) for node in waiting]  # nodes close to the loss first
    heapify(heap)
    while heap:
        _, node = heappop(heap)
        edges = [(node, nr) for nr in range(len(node._input_metadata))]
        own = [gradients.pop(edge, None) for edge in edges]
        if seen is not None:
            seen.update({e: g for e, g in zip(edges, own) if g is not None})
        for edge, result in zip(inputs_of(node), _called(node, own)):
            if edge is not None and result is not None:
                into, fitted = found if stops(edge) else gradients, _fitted(result, edge)
                into[edge] = into[edge] + fitted if edge in into else fitted
                if into is gradients and edge[0] in nodes and edge[0] not in waiting:
                    waiting.add(edge[0])
                    heappush(heap, (-nodes[edge[0]], edge[0]))
    return found


def _called(node: Node, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return what a node passes on for gradients at its outputs."""
    kind = kind_of_node(node)
    if kind in _IDENTITIES:
        return gradients
    if isinstance(node, BackwardCFunction):
        return _called_function(node, gradients)
    for formula in (distance_gradients, alignment_gradients):
        if (found := formula(kind, node, gradients[0])) is not None:
            return found
    call: Any = node
    results = call(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _called_function(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return what a function that is written in Python passes on to the edges of its inputs."""
    if _is_compiled(node):
        raise RuntimeError(_COMPILED)
    given = [zeros_at((node, i)) if g is None else g for i, g in enumerate(gradients)]
    results = node.apply(*given)
    results = results if isinstance(results, tuple) else (results,)
    needed = iter([r for r, need in zip(results, node.needs_input_grad) if need])
    return [None if edge is None else next(needed, None) for edge in inputs_of(node)]


def _is_compiled(node: Any) -> bool:
    """Return whether a function that is written in Python runs compiled code."""
    found: bool = node._forward_cls.__module__.startswith("torch._functorch")
    return found


def _fitted(gradient: Tensor, edge: Edge) -> Tensor:
    """Return a gradient in the shape and the data type of an edge, as autograd does."""
    metadata = metadata_of(edge)
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(tuple(metadata.shape))
    if gradient.is_complex() and not metadata.dtype.is_complex:
        gradient = gradient.real
    return gradient.to(metadata.dtype)


def metadata_of(edge: Edge) -> Any:
    """Return shape, data type and device of the tensor that an edge stands for."""
    node, index = edge
    return node._input_metadata[index]


def zeros_at(edge: Edge) -> Tensor:
    """Return a tensor of zeros like the one that an edge stands for."""
    metadata = metadata_of(edge)
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def reached_nodes(outputs: Sequence[Tensor | GradientEdge]) -> set[Node]:
    """Return the nodes of the graphs of outputs."""
    found: set[Node] = set()
    waiting = [o.node if isinstance(o, GradientEdge) else o.grad_fn for o in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


def has_compiled_code(outputs: Sequence[Tensor | GradientEdge]) -> bool:
    """Return whether the graphs of outputs have nodes of compiled code."""
    return any(_is_compiled(node) for node in _functions(outputs))


def has_functions(outputs: Sequence[Tensor | GradientEdge]) -> bool:
    """Return whether the graphs of outputs have functions that are written in Python.

    Operators of ``torch.library`` and control flow (``torch.cond``) are such functions.
    """
    return any(kind_of_node(node) not in _IDENTITIES for node in _functions(outputs))


def _functions(outputs: Sequence[Tensor | GradientEdge]) -> list[Any]:
    """Return the nodes of functions that are written in Python in the graphs of outputs."""
    return [node for node in reached_nodes(outputs) if isinstance(node, BackwardCFunction)]
