"""Losses that compare entries of distributions: divergences, entropies, logarithms with constants.

They are functions of the entries of several softmaxes in which entries of one place alone are
related. `matrix_choice` has the matrices that serve as their curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.compared_distributions import ComparedDistributions
from einconv_kfac.curvature.objective.graph import Edge, inputs_of, kind_of_node, within
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.matrix_choice import chosen_roots
from einconv_kfac.curvature.objective.nodes.elementary import saved_options
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.curvature.objective.terms import JointTerm, Term
from einconv_kfac.curvature.objective.units import drawn

ENTRIES = "entries of softmaxes"
"""The name of a term of them."""
MOST_TENSORS = 8
"""Number of tensors that are compared at most."""
LOGARITHMS = ("Log", "Log1P", "Log2", "Log10")
_KINDS = ("Softmax", "LogSoftmax")


class _Scores(NamedTuple):
    """One tensor of distributions.

    Args:
        argument: The edge by which the curvature is taken: scores, or what the model returns.
        result: The probabilities, or their logarithms.
        is_log: Whether they are logarithms.
        dim: The dimension of the classes.
        by_scores: Whether the argument stands for scores.
        probabilities: The edges of the results of softmaxes.
        logarithms: The edges of their logarithms.
    """

    argument: Edge
    result: Tensor
    is_log: bool
    dim: int
    by_scores: bool
    probabilities: list[Edge]
    logarithms: list[Edge]

    def p(self) -> Tensor:
        """Return the probabilities."""
        return self.result.exp() if self.is_log else self.result


@dataclass(frozen=True)
class Distributions:
    """The distributions that a loss depends on.

    Args:
        scores: The tensors.
        nodes: The nonlinear operations that depend on them alone, and those that return them.
    """

    scores: tuple[_Scores, ...]
    nodes: frozenset[Node]

    @staticmethod
    def of(graph: LossGraph) -> Distributions | None:
        """Return those of a loss, or ``None`` without some that are compared by themselves."""
        found: dict[tuple[Edge, int], _Scores] = {}
        ends = [(edge, within(edge)[0]) for edge in graph.outputs]
        for edge, node in [*(((n, 0), n) for n in graph.nonlinear), *ends]:
            if kind_of_node(node) in _KINDS:
                own = _scores(edge, node, is_end=graph.is_source(edge))
                known = found.setdefault((own.argument, own.dim), own)
                if known is not own:
                    known.probabilities.extend(own.probabilities)
                    known.logarithms.extend(own.logarithms)
        scores = tuple(found.values())
        alike = {(e.result.shape, e.result.dtype, e.dim, e.by_scores) for e in scores}
        if len(alike) != 1 or len(scores) > MOST_TENSORS or not scores[0].result.numel():
            return None
        if scores[0].result.dtype not in (torch.float32, torch.float64):
            return None
        nodes = _nodes_after(graph, {edge for each in scores for edge in _edges(each)})
        return None if nodes is None else Distributions(scores, frozenset(nodes))

    @staticmethod
    def end(graph: LossGraph) -> bool:
        """Return whether the model itself ends with a softmax."""
        return any(kind_of_node(within(edge)[0]) in _KINDS for edge in graph.outputs)

    def has_logarithms(self, joined: Collection[Node]) -> bool:
        """Return whether the loss has logarithms of probabilities with which the model ends.

        Args:
            joined: Those whose curvature is known together with that of the softmax.
        """
        logarithms = [node for node in self.nodes - {*joined} if kind_of_node(node) in LOGARITHMS]
        return bool(logarithms) and not self.scores[0].by_scores

    @property
    def edges(self) -> list[Edge]:
        """The tensors by which they enter the loss."""
        return [edge for each in self.scores for edge in _edges(each)]

    def term(self, graph: LossGraph, tail: Tail) -> Callable[[], Term | None]:
        """Return a function that finds the term of their curvature; the graph must exist.

        Args:
            graph: The graph of the loss.
            tail: The loss as a function of `edges`, of which zeros stand for the recorded values.
        """
        arguments = tuple(each.argument for each in self.scores)
        maps = tuple(graph.map_to(each) for each in arguments)

        def find() -> Term | None:
            try:
                curvature = _curvature(self.scores, tail)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a second derivative
                return None
            return None if curvature is None else JointTerm(arguments, maps, curvature, ENTRIES)

        return find


def _scores(edge: Edge, node: Any, *, is_end: bool) -> _Scores:
    """Return the distributions that a softmax or its logarithm has.

    Args:
        edge: The edge of its result.
        node: Its node.
        is_end: Whether the model ends with it.
    """
    result, is_log = node._saved_result.detach(), kind_of_node(node) == "LogSoftmax"
    before = inputs_of(node)[0]
    assert before is not None
    own = [edge], list[Edge]()
    return _Scores(
        edge if is_end else before,
        result,
        is_log,
        saved_options(node, ("dim",))["dim"] % max(result.ndim, 1),
        is_log or not is_end,
        *(own[::-1] if is_log else own),
    )


def _edges(scores: _Scores) -> list[Edge]:
    """Return the edges by which distributions enter a loss."""
    return [*scores.probabilities, *scores.logarithms]


def _nodes_after(graph: LossGraph, edges: Collection[Edge]) -> set[Node] | None:
    """Return the nonlinear operations after edges, or ``None`` if one has other inputs as well."""
    nonlinear, found = set(graph.nonlinear), {edge[0] for edge in edges if edge[0] in graph.nodes}
    after: dict[Node, set[bool]] = {}
    for node in graph.nodes:
        own: set[bool] = set()
        for edge in (each for each in inputs_of(node) if each is not None):
            if edge in edges:
                own.add(True)
            else:
                own |= {False} if graph.is_source(edge) else after.get(edge[0], set())
        after[node] = own
        if node in nonlinear and True in own:
            if False in own:
                return None
            found.add(node)
    return found


def _curvature(scores: Sequence[_Scores], tail: Tail) -> ComparedDistributions | None:
    """Return the curvature by scores, or ``None`` if it is of another structure or not positive."""
    probabilities = [each.p() for each in scores]
    derivatives = _derivatives(scores, probabilities, tail)
    if derivatives is None:
        return None
    (gradient, linear, hessian), dim = derivatives, scores[0].dim
    p = torch.stack(probabilities, -1)
    blocks = chosen_roots(p, gradient, linear, hessian, dim)
    if blocks is None:
        return None
    return ComparedDistributions(p, blocks.to(p.dtype), dim, scores[0].by_scores)


def _derivatives(
    scores: Sequence[_Scores], probabilities: Sequence[Tensor], tail: Tail
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradient, its linear part, and the Hessian by the logarithms of probabilities.

    ``[*a, K]``, ``[*a, K]`` and ``[*a, K, K]``; ``None`` if different places are related.
    """
    zeros = [torch.zeros_like(p) for p in probabilities]
    with torch.enable_grad():
        logs = [zero.clone().requires_grad_() for zero in zeros]
        changes = {e: v for each, v in zip(scores, logs) for e in each.logarithms}
        direct = tail.last(changes, create_graph=True)
        alone = _gradients(None if direct is None else (tail.weight * direct).sum(), logs)
        for each, p, v in zip(scores, probabilities, logs):
            changes |= {edge: p * v.expm1() for edge in each.probabilities}
        loss = tail.value([changes[edge] for edge in tail.sources], create_graph=True)
        slopes = _gradients(loss, logs, create_graph=True)

    def product(vectors: Sequence[Tensor]) -> Tensor:
        pairs = [(slope * v).sum() for slope, v in zip(slopes, vectors) if slope.requires_grad]
        return torch.stack(_gradients(sum(pairs) if pairs else None, logs), -1)

    columns = [
        product([torch.ones_like(z) if k == own else z for k, z in enumerate(zeros)])
        for own in range(len(zeros))
    ]
    hessian = torch.stack(columns, -1)
    random = [drawn(p, seed) for seed, p in enumerate(probabilities)]
    want, found = product(random), (hessian @ torch.stack(random, -1).unsqueeze(-1)).squeeze(-1)
    if not bool((found - want).norm() <= torch.finfo(want.dtype).eps ** 0.5 * want.norm()):
        return None
    gradient = torch.stack([slope.detach() for slope in slopes], -1)
    return gradient, torch.stack(alone, -1), hessian


def _gradients(value: Any, inputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the derivatives of a number, or zeros where it does not depend on an input."""
    if value is None or not value.requires_grad:
        return [torch.zeros_like(each) for each in inputs]
    options: Any = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return list(torch.autograd.grad(value, inputs, **options))
