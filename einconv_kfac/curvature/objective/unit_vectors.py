"""The curvature of losses that are linear in unit vectors, as in cosine similarities.

Of unit vectors ``q`` a loss ``<g, q>`` is ``|g| |q + g / |g||^2 / 2`` less a constant, and
``-<q, r>`` of two of them is ``|q - r|^2 / 2`` less one. The terms are those of the squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import (
    Edge,
    first_met,
    inputs_of,
    kind_of_node,
    within,
)
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.recorded_results import Known, recorded_result
from einconv_kfac.curvature.objective.terms import Term

UNIT_VECTORS = "unit vectors"
"""The name of these terms."""


@dataclass(frozen=True)
class DirectionTerm(Term):
    """A term whose argument is a direction ``x / |x|``, or the difference of two.

    Args:
        units: The directions of the vectors at the edges.
        lengths: The lengths ``|x|``, of size 1 in the dimension of a vector.
        dim: That dimension.
    """

    units: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    dim: int

    def tangent(self, vectors: Mapping[Edge, Tensor]) -> Tensor | None:
        """See `Term`."""
        parts = [each(vectors) for each in self.maps]
        signed = [self._turned(p, index) for index, p in enumerate(parts) if p is not None]
        return sum(signed[1:], signed[0]) if signed else None

    def gradients(self, root: Tensor) -> dict[Edge, Tensor]:
        """See `Term`."""
        return {edge: self._turned(root, index) for index, edge in enumerate(self.argument)}

    def _turned(self, change: Tensor, index: int) -> Tensor:
        """Return the derivative of the argument by a vector, which is symmetric, applied to one."""
        unit = self.units[index].to(change.dtype)
        radial = unit * (unit * change).sum(self.dim, keepdim=True)
        result = (change - radial) / self.lengths[index].to(change.dtype)
        return -result if index else result


def unit_vectors(graph: LossGraph) -> Iterator[tuple[Edge, Term]]:
    """Yield the terms of unit vectors that a loss is linear in, with the operations next to it.

    Args:
        graph: The graph of the loss, which must exist.
    """
    nonlinear = {*graph.nonlinear}
    inner = any(kind_of_node(node) in ("Div", "Mul") for node in nonlinear)
    if not inner and not any(kind_of_node(within(edge)[0]) == "Div" for edge in graph.ends):
        return
    with torch.no_grad():
        for edge, weight in graph.linear_part().items():
            seen = graph.ends.get(edge, graph.seen.get(edge))
            if weight.is_complex() or seen is None or not _are_close(weight, seen):
                continue  # where other operations depend on them as well
            precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
            term = _term_of_units(graph, edge, precise)
            if term is None and edge[0] in nonlinear and not bool((weight > 0).any()):
                term = _term_of_pairs(graph, edge, -precise)
                term = _term_of_cosines(graph, edge, -precise) if term is None else term
            if term is not None:
                yield edge, term


def _term_of_units(graph: LossGraph, edge: Edge, weight: Tensor) -> Term | None:
    """Return the term of unit vectors with constant weights ``g``."""
    node = within(edge)[0]
    if kind_of_node(node) != "Div" or not (dims := _directions(node)):
        return None
    size = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return Term((edge,), (graph.map_to(edge),), Diagonal(size.expand_as(weight)), UNIT_VECTORS)


def _term_of_pairs(graph: LossGraph, edge: Edge, weight: Tensor) -> Term | None:
    """Return the term of a product of unit vectors that both depend on the model."""
    node: Any = edge[0]
    pair = [each for each in inputs_of(node) if each is not None]
    if kind_of_node(node) != "Mul" or {kind_of_node(each[0]) for each in pair} != {"Div"}:
        return None
    dims, shapes = {_directions(each[0]) for each in pair}, {node._saved_self.shape, weight.shape}
    are_alike = len(dims) == len(shapes | {node._saved_other.shape}) == 1 and all(dims)
    if len({*pair}) < 2 or not are_alike:
        return None
    maps = tuple(graph.map_to(each) for each in pair)
    return Term(tuple(pair), maps, Diagonal(weight), UNIT_VECTORS)


def _term_of_cosines(graph: LossGraph, edge: Edge, weight: Tensor) -> Term | None:
    """Return the term of sums ``<x, y>`` divided by ``|x| |y|``, or by ``|x|`` for a constant y."""
    node: Any = edge[0]
    start = inputs_of(node)[0]
    if kind_of_node(node) != "Div" or start is None or node._saved_self is None:
        return None
    found = first_met([start], lambda e: kind_of_node(e[0]) not in LINEAR)
    product = found.pop()[0]
    factors = _factors(graph, product) if not found and kind_of_node(product) == "Mul" else []
    own = {k: e for k, e in enumerate(inputs_of(product)) if e is not None and graph.depends(e)}
    if len({*own.values()}) < len(own):
        return None  # of a tensor with itself
    quotients = node._saved_self.detach() / node._saved_other.detach()
    for dim in range(factors[0].ndim if factors else 0):
        lengths = [torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in factors]
        units = [x / length for x, length in zip(factors, lengths)]
        cosines = (units[0] * units[1]).sum(dim, keepdim=True)
        for scale in (
            torch.ones_like(cosines),
            *(s for k, s in enumerate(lengths) if k not in own),
        ):
            if quotients.numel() != cosines.numel() or not _are_close(
                (cosines * scale).reshape(quotients.shape), quotients
            ):
                continue
            weights = (weight.reshape(scale.shape) * scale).expand_as(factors[0])
            return DirectionTerm(
                argument=tuple(own.values()),
                maps=tuple(graph.map_to(each) for each in own.values()),
                curvature=Diagonal(weights),
                name=UNIT_VECTORS,
                units=tuple(units[k] for k in own),
                lengths=tuple(lengths[k] for k in own),
                dim=dim,
            )
    return None


def _factors(graph: LossGraph, product: Any) -> list[Tensor]:
    """Return the two factors of a product of one shape, or nothing if they cannot be found."""
    known, found = Known(output=graph.output), list[Tensor]()
    for edge, name in zip(inputs_of(product), ("self", "other")):
        value = getattr(product, f"_saved_{name}")
        if value is None and edge is not None:
            value = recorded_result(edge, known)
        if value is None or value.is_complex():
            return []
        found.append(value.detach())
    return found if found[0].shape == found[1].shape else []


def _directions(node: Any) -> tuple[int, ...]:
    """Return the dimensions in which a quotient is a unit vector; none if it is not."""
    own, norm = node._saved_self, node._saved_other
    if own is None or norm is None or own.is_complex():
        return ()
    norm = norm.detach().expand_as(own)
    dims = tuple(d for d, step in enumerate(norm.stride()) if not step and own.shape[d] > 1)
    if not dims:
        return ()
    lengths = torch.linalg.vector_norm(own.detach() / norm, dim=dims)
    return dims if _are_close(lengths, torch.ones_like(lengths)) else ()


def _are_close(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors differ by rounding, or by a number that is added to norms, at most."""
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance)
