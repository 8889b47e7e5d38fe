"""Squares that a graph spells as a product of a tensor with itself, or as a power of its norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, inputs_of, kind_of_node
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.nodes.elementary import CURVATURE_ROUNDING, saved_options

Same: TypeAlias = Callable[[Edge, Edge], bool]
"""Returns whether two tensors are the same function of the model's outputs."""
_PRODUCTS = {"Mul": ("self", "other"), "Dot": ("self", "tensor")}
"""Products of entries, with the names under which their nodes save the factors."""
_NORMS = {"LinalgVectorNorm": "ord", "Norm": "p"}
"""Norms, with the names under which their nodes save the order."""


def squared(node: Any, weight: Tensor, is_same: Same) -> tuple[Edge, Diagonal] | None:
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
    edge: Edge | None = found[0]
    weight = weight.expand(found[1]) if weight.ndim == 0 else weight
    if _is_norm(found[0][0]):
        edge, weight = inputs_of(found[0][0])[0], _spread(found[0][0], weight)
    elif kind_of_node(node) == "Pow":
        return None  # the rule of powers
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    largest = precise.max() if precise.numel() else precise.sum()
    if edge is None or not bool(largest > 0):
        return None
    if bool(precise.min() < -CURVATURE_ROUNDING * largest):
        return None
    return edge, Diagonal(2 * precise.clamp_min(0))


def _base(node: Any, is_same: Same) -> tuple[Edge, torch.Size] | None:
    """Return the edge that a node squares, with its shape."""
    kind, edges = kind_of_node(node), inputs_of(node)
    if kind == "Pow" and node._saved_exponent == 2 and edges[0] is not None:
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


def _is_norm(node: Any) -> bool:
    """Return whether a node is a Euclidean norm of real numbers."""
    order = _NORMS.get(kind_of_node(node))
    if order is None or node._saved_self.is_complex():
        return False
    return bool(saved_options(node, (order,))[order] == 2)


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
