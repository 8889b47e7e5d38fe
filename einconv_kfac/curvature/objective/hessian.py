"""The Hessian of a loss by one output of a model, where no rule of a single operation gives it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    first_met,
    inputs_of,
    kind_of_node,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import Blocks, Diagonal, LocalCurvature
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.units import drawn

WHOLE = "the loss as a whole"
"""The name of a term that no single operation gives."""
LARGEST_BLOCK = 64
"""Rows up to which the blocks of a Hessian are computed, with one product for each row."""

_PROBABILITIES = {"Sigmoid", "Softmax", "Exp", "Exp2", "Reciprocal", "Div", "Mul", "Pow", "Cosh"}
_PROBABILITIES |= {"Clamp", "ClampMin", "ClampMax", "Softplus"}
_ROOTS = {"Sqrt", "Abs", "LinalgVectorNorm", "Norm", "Dist"}
_UNDONE = {
    **dict.fromkeys(
        ("Log", "Log1P", "Log2", "Log10", "BinaryCrossEntropy", "SpecialEntr"), _PROBABILITIES
    ),
    **dict.fromkeys(("Pow", "Mul"), _ROOTS),
}
"""Operations that are curved together with those before them in another way than alone."""
TOGETHER = {*_UNDONE, *_PROBABILITIES, *_ROOTS, "LogSoftmax", "Logsumexp"}
Product = Callable[[Tensor], "Tensor | None"]
"""Returns the product of the Hessian and a vector."""
Graph = tuple[Sequence[Tensor], Sequence["Tensor | None"]]
"""Outputs and parameters of a loss, and its derivatives by them, with their graph."""


def may_lack(
    root: Edge,
    nonlinear: Collection[Node],
    curved: Collection[Node],
    joined: Collection[Node],
    among: Collection[Node] | None = None,
) -> bool:
    """Return whether the rules of single operations may give less than the Hessian of a loss.

    That is so where the operations next to the loss have no curvature of their own, as the product
    of two tensors, or undo what is before them, as the logarithm of probabilities.

    Args:
        root: The edge of the loss.
        nonlinear: The nonlinear operations between outputs and loss.
        curved: Those whose curvature is known.
        joined: Those whose curvature is known together with that of operations before them.
        among: The operations that are asked about; all by default.
    """
    first = nearest(root, nonlinear)
    for node in first if among is None else first.intersection(among):
        if node not in curved:
            return True
        if node in joined:
            continue
        before = {kind_of_node(each) for each in _nearest_before(node, nonlinear)}
        if before & _UNDONE.get(kind_of_node(node), set()):
            return True
    return False


def with_hessians(
    terms: Sequence[Term], tail: Tail, outputs: Sequence[Edge], unbatched: Collection[Edge]
) -> list[Term]:
    """Return terms, or Hessians by outputs in place of those that give other products.

    Args:
        terms: The terms that rules of operations give.
        tail: The loss as a function of the outputs.
        outputs: The outputs.
        unbatched: Those without a dimension of examples.
    """
    result = list(terms)
    if tail.unknown():
        return result
    graph = cache(partial(_graph, tail))
    by_source: dict[Edge, list[Term]] = defaultdict(list)
    for term in terms:
        for edge in term.sources:
            by_source[edge].append(term)
    for edge in outputs:
        known = by_source[edge]
        if any(len(term.sources) > 1 for term in known):
            continue
        try:
            found = _hessian_term(tail, edge, known, graph, is_one=edge in unbatched)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a second derivative
            continue
        if found is not None:
            result = [each for each in result if each not in known] + [found]
    return result


def by_arguments(
    terms: Sequence[Term],
    found: Sequence[tuple[Tail, Mapping[Edge, LinearMap]]],
    outputs: Collection[Edge],
    is_one: bool,
) -> Sequence[Term]:
    """Return the Hessians by the first tensors that have one each, or else the terms.

    Args:
        terms: The terms that rules of operations give.
        found: Losses as functions of tensors, with the derivatives of these by the sources.
        outputs: The outputs of the model; Hessians by them may be the sum of the terms.
        is_one: Whether all entries of a tensor may be of one example.
    """
    for tail, maps in found:
        own = {e: hessian_by(tail, e, terms if e in outputs else (), is_one=is_one) for e in maps}
        curvatures = {edge: each for edge, each in own.items() if each is not None}
        if curvatures and all(e in curvatures or _is_linear(tail, e) for e in maps):
            return [Term((e,), (maps[e],), each, WHOLE) for e, each in curvatures.items()]
    return terms


def _is_linear(tail: Tail, edge: Edge) -> bool:
    """Return whether a loss is linear in a tensor, up to rounding."""
    graph = _graph(tail)
    slope, product = graph[1][tail.sources.index(edge)], _product(tail, edge, graph)
    if slope is None or product is None:
        return True
    tolerance = torch.finfo(slope.dtype).eps ** 0.5
    found = product(drawn(slope).to(slope.dtype))
    return found is not None and bool(found.norm() <= tolerance * slope.norm())


def hessian_by(
    tail: Tail, edge: Edge, known: Sequence[Term], *, is_one: bool
) -> LocalCurvature | None:
    """Return the Hessian of a loss by a tensor; for ``None`` see `_hessian_term`.

    Args:
        tail: The loss as a function of the tensor.
        edge: The tensor.
        known: Terms that rules of operations give, if the tensor is an output.
        is_one: Whether all entries of the tensor may be of one example.
    """
    try:
        found = _hessian_term(tail, edge, known, partial(_graph, tail), is_one=is_one)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a second derivative
        return None
    return None if found is None else found.curvature


def nearest(start: Edge, wanted: Collection[Node]) -> set[Node]:
    """Return the first nodes among those wanted on the way down from an edge."""
    return {edge[0] for edge in first_met([start], lambda edge: edge[0] in wanted)}


def _nearest_before(node: Node, wanted: Collection[Node]) -> set[Node]:
    """Return the first nodes among those wanted on the way down from a node's inputs."""
    starts = [edge for edge in inputs_of(node) if edge is not None]
    return {edge[0] for edge in first_met(starts, lambda edge: edge[0] in wanted)}


def _graph(tail: Tail) -> Graph:
    """Return outputs and parameters at which a loss is evaluated, and its derivatives by them."""
    with torch.enable_grad():
        sources = [value.detach().clone().requires_grad_() for value in tail.values]
        loss = tail.value(sources, create_graph=True)
        if not loss.requires_grad:
            return sources, [None] * len(sources)
        return sources, torch.autograd.grad(loss, sources, create_graph=True, allow_unused=True)


def _hessian_term(
    tail: Tail,
    edge: Edge,
    known: Sequence[Term],
    graph: Callable[[], Graph],
    *,
    is_one: bool,
) -> Term | None:
    """Return the term of an output whose curvature is the Hessian of the loss by it.

    ``None`` if the Hessian is the sum of the terms that are known, not positive semi-definite,
    or neither diagonal nor of small blocks.

    Args:
        tail: The loss as a function of the outputs.
        edge: The output.
        known: The terms that depend on the output.
        graph: Returns the derivatives of the loss, once for all outputs.
        is_one: Whether all entries of the output may be one block.
    """
    value = tail.values[tail.sources.index(edge)]
    if not value.numel() or value.dtype not in (torch.float32, torch.float64):
        return None
    product = _product(tail, edge, graph())
    if product is None:
        return None
    first, second = (drawn(value, seed).to(value.dtype) for seed in (1, 2))
    found = product(first)
    if found is None or not bool(found.any()) or not bool(found.isfinite().all()):
        return None
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    if _is_known(known, edge, (first, second), found, tolerance):
        return None
    curvature = _curvature(product, first, found, tolerance, is_one=is_one)
    if curvature is None:
        return None
    return Term((edge,), (LinearMap(edge, {}, lambda each: each == edge),), curvature, WHOLE)


def _product(tail: Tail, edge: Edge, graph: Graph) -> Product | None:
    """Return products with the Hessian, or ``None`` if other sources share its curvature."""
    sources, slopes = graph
    slope = slopes[tail.sources.index(edge)]
    if slope is None or not slope.requires_grad:
        return None

    related = dict(zip(tail.sources, sources))

    def product(vector: Tensor) -> Tensor | None:
        inputs = [*related.values()]
        found = torch.autograd.grad(slope, inputs, vector, retain_graph=True, allow_unused=True)
        by_source = {e: own for e, own in zip(related, found) if own is not None}
        for other in related.keys() - by_source.keys():  # nor will it be for other vectors
            del related[other]
        result = by_source.pop(edge, None)
        is_alone = not any(bool(each.any()) for each in by_source.values())
        return result if is_alone else None

    return product


def _is_known(
    known: Sequence[Term], edge: Edge, pair: tuple[Tensor, Tensor], found: Tensor, tolerance: float
) -> bool:
    """Return whether the terms that are known have the product that was found."""
    vectors = [{edge: vector} for vector in pair]
    parts = [each for term in known if (each := term.products(vectors)) is not None]
    total = sum(parts[1:], parts[0]) if parts else found.new_zeros(2, 2, dtype=torch.float64)
    expected = torch.stack([(vector * found).sum().double() for vector in pair])
    return torch.allclose(total[0], expected, rtol=tolerance, atol=0.0)


def _curvature(
    product: Product, vector: Tensor, found: Tensor, tolerance: float, *, is_one: bool
) -> LocalCurvature | None:
    """Return the Hessian, which has a product that is given, as a diagonal or as blocks."""

    def is_found(other: Tensor) -> bool:
        return bool((other - found).norm() <= tolerance * found.norm())

    diagonal = product(torch.ones_like(vector))
    if diagonal is not None and is_found(diagonal * vector):
        if bool(diagonal.min() < -tolerance * diagonal.max()):
            return None
        return Diagonal(diagonal.clamp_min(0))
    for dims in range(1, vector.ndim + is_one):
        rows = vector.shape[: vector.ndim - dims]
        if vector[(0,) * len(rows)].numel() > LARGEST_BLOCK:
            return None
        blocks = _blocks(product, vector, rows)
        flat = vector.reshape(*rows, -1)
        if blocks is not None and is_found((blocks @ flat.unsqueeze(-1)).reshape(vector.shape)):
            return Blocks.of(blocks, vector.shape, tolerance)
    return None


def _blocks(product: Product, like: Tensor, rows: torch.Size) -> Tensor | None:
    """Return the diagonal blocks ``[*rows, d, d]``, if all others are zero."""
    columns = []
    flat = like.reshape(*rows, -1)
    for column in range(flat.shape[-1]):
        unit = torch.zeros_like(flat)
        unit[..., column] = 1
        found = product(unit.reshape(like.shape))
        if found is None:
            return None
        columns.append(found.reshape(flat.shape))
    return torch.stack(columns, -1)
