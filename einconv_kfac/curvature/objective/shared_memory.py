"""Tensors of a graph that share memory with a parameter, which a step changes in place."""

from __future__ import annotations

from torch import Tensor, nn

from einconv_kfac.curvature.objective.graph import Edge, inputs_of, leaf_of


def as_recorded(value: Tensor, edge: Edge) -> Tensor:
    """Return a tensor that stays as it is now: a copy of a parameter or of a view of one.

    After a step the objective is evaluated by how tensors have changed since they were recorded. A
    parameter, or a node's saved input that is a view of one, has changed with the step itself.

    Args:
        value: The tensor.
        edge: The tensor in the graph.
    """
    leaf = _only_leaf(edge)
    if leaf is None or not _may_share(value, leaf):
        return value
    return value.detach().clone()


def _only_leaf(edge: Edge) -> Tensor | None:
    """Return the leaf that a tensor is computed from by operations of one argument, or ``None``."""
    while (leaf := leaf_of(edge)) is None:
        before = [each for each in inputs_of(edge[0]) if each is not None]
        if len(before) != 1:
            return None
        edge = before[0]
    return leaf


def _may_share(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors share memory; tensors of other libraries are taken to."""
    if not all(type(each) in (Tensor, nn.Parameter) for each in (first, second)):
        return True
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
