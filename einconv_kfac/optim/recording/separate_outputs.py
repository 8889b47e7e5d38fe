"""Outputs of a call at which only gradients of the script arrive.

A derivative of a second output reaches the first one if that is computed from it, and the second
derivative of a hyperbolic tangent reaches its result, which it is computed from. These are parts of
derivatives that are taken inside of the call. So the script gets a copy of such an output, with an
edge of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_flatten, tree_unflatten

from einconv_kfac.curvature.objective.graph import Edge, edge_of, first_met, inputs_of


def separate(output: Any, tensors: Sequence[Tensor], first: int) -> tuple[Any, set[int]]:
    """Return an output of a call, with copies of tensors that inner gradients may reach.

    Tensors in objects that torch does not divide into parts remain as they are.

    Args:
        output: The output.
        tensors: Its tensors.
        first: The sequence number of the first node of the call.

    Returns:
        The output, and the identities of its tensors that inner gradients may reach.
    """
    own = {id(t): t for t in tensors if t.grad_fn is not None and t.grad_fn._sequence_nr() >= first}
    inner = _inner([edge_of(tensor) for tensor in own.values()], first) if len(own) > 1 else set()
    copies = {
        key: tensor.clone()
        for key, tensor in own.items()
        if edge_of(tensor) in inner or _keeps_result(tensor)
    }
    if not copies:
        return output, set()
    parts, spec = tree_flatten(output)
    given = [copies.get(id(part), part) for part in parts]
    return tree_unflatten(given, spec), copies.keys() - {id(part) for part in parts}


def _inner(edges: Sequence[Edge], first: int) -> set[Edge]:
    """Return the edges on which another one depends inside of the call."""
    starts = [each for edge in edges for each in inputs_of(edge[0]) if each is not None]
    ends = set(edges)
    found = first_met(starts, lambda edge: edge in ends or edge[0]._sequence_nr() < first)
    return found & ends


def _keeps_result(tensor: Tensor) -> bool:
    """Return whether the operation that a tensor results from may keep it for its derivative."""
    node: Any = tensor.grad_fn
    names = ("_saved_result", "_saved_result0", "_saved_inverse")
    return isinstance(node, BackwardCFunction) or any(hasattr(node, name) for name in names)
