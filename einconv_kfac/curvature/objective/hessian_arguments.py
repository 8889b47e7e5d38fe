"""The tensors by which a model enters the operations of a loss that are curved together."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    Stops,
    first_met,
    inputs_of,
    kind_of_node,
    metadata_of,
)
from einconv_kfac.curvature.objective.hessian import TOGETHER, nearest
from einconv_kfac.curvature.objective.nodes.reductions import is_selection

_BILINEAR = {"Mm", "Bmm", "Mv", "Dot", "Vdot", "Addmm", "Baddbmm", "Addbmm", "Addmv", "Addr"}
_EXPONENTIALS = {"Sigmoid", "Softmax", "Exp", "Exp2"}


def arguments(root: Edge, nonlinear: Collection[Node], is_source: Stops) -> Iterator[set[Edge]]:
    """Yield sets of tensors by which a Hessian may be taken, the first that is one is wanted.

    They are one tensor, below which are other nonlinear operations or outputs, and what
    exponentials are taken of, if that is computed from the outputs by nonlinear operations: the
    products of two embeddings, say, whose sigmoid is taken and then its logarithm.

    Args:
        root: The edge of the loss.
        nonlinear: The nonlinear operations between outputs and loss.
        is_source: Whether an edge is an output of the model or a parameter.
    """
    found = _arguments(root, nonlinear, is_source, ())
    if len(found) == 1:
        yield found
    near = _arguments(root, nonlinear, is_source, _exponents(nonlinear, is_source))
    if near != found and not any(is_source(e) or not nearest(e, nonlinear) for e in near):
        yield near


def _exponents(nonlinear: Collection[Node], is_source: Stops) -> set[Edge]:
    """Return what exponentials are taken of, without those that are linear in others of them."""
    found = {
        edge
        for node in nonlinear
        if kind_of_node(node) in _EXPONENTIALS
        for edge in inputs_of(node)
        if edge is not None
    }

    def stops(edge: Edge) -> bool:
        return edge in found or edge[0] in nonlinear or is_source(edge)

    def is_linear(edge: Edge) -> bool:
        if edge[0] in nonlinear or is_source(edge):
            return False
        before = first_met([e for e in inputs_of(edge[0]) if e is not None], stops)
        return bool(before) and before <= found

    return {edge for edge in found if not is_linear(edge)}


def _arguments(
    root: Edge, nonlinear: Collection[Node], is_source: Stops, ends: Collection[Edge]
) -> set[Edge]:
    """Return the tensors by which a model enters operations that are curved together.

    Below them are other nonlinear operations, in low precision those that are cast, or outputs.

    Args:
        root: The edge of the loss.
        nonlinear: The nonlinear operations between outputs and loss.
        is_source: Whether an edge is an output of the model or a parameter.
        ends: Further tensors below which nothing is curved together with what is above.
    """
    found: set[Edge] = set()
    for node in nearest(root, nonlinear):
        passed = set() if kind_of_node(node) in _BILINEAR else TOGETHER

        def stops(edge: Edge, passed: Collection[str] = passed) -> bool:
            is_other = edge[0] in nonlinear and kind_of_node(edge[0]) not in passed
            is_end = is_source(edge) or edge in ends or _is_raised(edge)
            return is_end or (is_other and not is_selection(edge[0]))

        found |= first_met([edge for edge in inputs_of(node) if edge is not None], stops)
    return found


def _is_raised(edge: Edge) -> bool:
    """Return whether a tensor was cast to a higher precision."""
    if kind_of_node(edge[0]) != "ToCopy" or (before := inputs_of(edge[0])[0]) is None:
        return False
    before_cast, dtype = metadata_of(before).dtype, metadata_of(edge).dtype
    return before_cast != dtype and bool(torch.promote_types(before_cast, dtype) == dtype)
