"""Squares that a graph spells as a product of a tensor with itself, or as a power of its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, inputs_of, kind_of_node, metadata_of
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.nodes.elementary import (
    CURVATURE_ROUNDING,
    is_square,
    saved_options,
)

Same: TypeAlias = Callable[[Edge, Edge], bool]
"""Returns whether two tensors are the same function of the model's outputs."""
_PRODUCTS = {"Mul": ("self", "other"), "Dot": ("self", "tensor"), "Vdot": ("self", "other")}
"""Products of entries, with the names under which their nodes save the factors."""
_NORMS = {"LinalgVectorNorm": "ord", "Norm": "p", "Dist": "p"}
"""Norms, with the names under which their nodes save the order."""


_DISTANCES = {"Cdist": ("x1", "x2"), "EuclideanDist": ("x1", "x2")}
"""Distances of all rows of two tensors, with the names under which their nodes save these."""
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")
Argument: TypeAlias = Sequence["Edge | None"]
"""The tensor that is squared, or two tensors whose difference is."""


def squared(node: Any, weight: Tensor, is_same: Same) -> tuple[Argument, Diagonal] | None:
    """Return the tensor ``x`` whose entries a node squares, and the curvature ``2 w`` by it.

    The other rules see a product of two tensors, or the square of one number. ``None`` if the node
    is no such square, or its weight is negative.

    Args:
        node: The node.
        weight: The derivative of the loss by the node's output.
        is_same: Compares the factors of a product.
    """
    found = _base(node, is_same)
    if found is None or weight.is_complex():
        return None
    argument: Argument = [found[0]]
    weight = weight.expand(found[1]) if weight.ndim == 0 else weight
    base, before = _before_views(found[0], weight)
    if _is_norm(base):
        argument, weight = inputs_of(base)[:2], _spread(base, before)
    elif _is_distance(base):
        argument, weight = _of_rows(base, before)
    elif kind_of_node(node) == "Pow":
        return None  # the rule of powers
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    largest = precise.max() if precise.numel() else precise.sum()
    if not any(argument) or not bool(largest > 0):
        return None
    if bool(precise.min() < -CURVATURE_ROUNDING * largest):
        return None
    return argument, Diagonal(2 * precise.clamp_min(0))


def is_squared(node: Any, is_same: Same) -> bool:
    """Return whether a node squares the entries of a tensor, or is their variance."""
    return kind_of_node(node) == "Var" or _base(node, is_same) is not None


def absolute_entries(node: Any, weight: Tensor) -> tuple[Edge, Tensor, Tensor] | None:
    """Return the tensor whose absolute values a node sums up, these values, and their weights.

    ``None`` if the node is no norm of order one of real numbers.

    Args:
        node: The node.
        weight: The derivative of the loss by the norms.
    """
    if not _is_norm(node, order=1) or kind_of_node(node) == "Dist":
        return None
    edge, values = inputs_of(node)[0], node._saved_self.detach().abs()
    return None if edge is None else (edge, values, _spread(node, weight))


def root_of_squares(node: Any, weight: Tensor) -> tuple[Argument, Diagonal] | None:
    """Return the tensor whose norm a node takes, and the curvature ``w / |x|`` by it.

    It is that of ``sqrt(sum(x^2))`` with the curvature of the squares. ``None`` if the node has
    several norms, as one for each example, or a norm or its weight is not positive.

    Args:
        node: The node.
        weight: The derivative of the loss by the norm.
    """
    if weight.numel() != 1 or not _is_norm(node, order=2) or node._saved_self.numel() == 1:
        return None
    share = weight.to(torch.promote_types(weight.dtype, torch.float32)) / node._saved_result
    if not bool(share > 0) or not bool(share.isfinite()):
        return None
    return inputs_of(node)[:2], Diagonal(share.reshape(()).expand(node._saved_self.shape))


def _base(node: Any, is_same: Same) -> tuple[Edge, torch.Size] | None:
    """Return the edge that a node squares, with its shape."""
    kind, edges = kind_of_node(node), inputs_of(node)
    if kind == "Pow" and edges[0] is not None and is_square(node):
        return edges[0], node._saved_self.shape
    if kind not in _PRODUCTS or len(edges) < 2 or edges[0] is None or edges[1] is None:
        return None
    first, second = (getattr(node, f"_saved_{name}", None) for name in _PRODUCTS[kind])
    if first is None or second is None or first.shape != second.shape or first.is_complex():
        return None
    if edges[0] != edges[1]:
        if kind_of_node(edges[0][0]) != kind_of_node(edges[1][0]):
            return None
        if not torch.equal(first.detach(), second.detach()) or not is_same(edges[0], edges[1]):
            return None
    return edges[0], first.shape


def _before_views(edge: Edge, weight: Tensor) -> tuple[Any, Tensor]:
    """Return the node whose output has been given another shape at most, with its weight."""
    while kind_of_node(edge[0]) in _VIEWS and (before := inputs_of(edge[0])[0]) is not None:
        edge, weight = before, weight.reshape(metadata_of(before).shape)
    return edge[0], weight


def _is_distance(node: Any) -> bool:
    """Return whether a node has the Euclidean distances of rows to rows that are constant."""
    kind, edges = kind_of_node(node), inputs_of(node)
    if kind not in _DISTANCES or (edges[0] is not None and edges[1] is not None):
        return False
    return kind == "EuclideanDist" or bool(saved_options(node, ("p",))["p"] == 2)


def _of_rows(node: Any, weight: Tensor) -> tuple[Argument, Tensor]:
    """Return the rows ``[*b, n, d]`` that a node takes distances of, with the weights of entries.

    Args:
        node: The node.
        weight: The weights of the distances, ``[*b, n, m]``.
    """
    edges, names = inputs_of(node), _DISTANCES[kind_of_node(node)]
    index = 0 if edges[1] is None else 1
    rows = getattr(node, f"_saved_{names[index]}")
    return [edges[index]], weight.sum(-2 if index else -1).unsqueeze(-1).expand(rows.shape)


def _is_norm(node: Any, order: float = 2) -> bool:
    """Return whether a node is a norm of real numbers, a Euclidean one by default."""
    name = _NORMS.get(kind_of_node(node))
    if name is None or node._saved_self.is_complex():
        return False
    if kind_of_node(node) == "Dist" and node._saved_self.shape != node._saved_other.shape:
        return False
    return bool(saved_options(node, (name,))[name] == order)


def _spread(norm: Any, weight: Tensor) -> Tensor:
    """Return weights of norms as those of the entries that they sum over."""
    shape = norm._saved_self.shape
    options = saved_options(
        norm, tuple(n for n in ("dim", "keepdim") if hasattr(norm, f"_saved_{n}"))
    )
    dims = options.get("dim")
    if weight.ndim and not options.get("keepdim", False):
        for dim in sorted(each % len(shape) for each in dims or ()):
            weight = weight.unsqueeze(dim)
    return weight.expand(shape)
