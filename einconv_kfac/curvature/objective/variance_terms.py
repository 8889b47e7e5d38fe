"""The curvature of variances and standard deviations, as of the squares that they are means of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, inputs_of, kind_of_node
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.loss_graph import LossGraph
from einconv_kfac.curvature.objective.nodes.elementary import saved_options
from einconv_kfac.curvature.objective.terms import Term


@dataclass(frozen=True)
class CentredTerm(Term):
    """A term whose argument is the difference of a tensor from its means over dimensions.

    Args:
        dims: The dimensions.
        is_whole: Whether it is the Hessian, as it is of variances; roots of these have less.
    """

    dims: tuple[int, ...]
    is_whole: bool

    def tangent(self, vectors: Mapping[Edge, Tensor]) -> Tensor | None:
        """See `Term`."""
        found = super().tangent(vectors)
        return None if found is None else self._centred(found)

    def gradients(self, root: Tensor) -> dict[Edge, Tensor]:
        """See `Term`."""
        return super().gradients(self._centred(root))

    def _centred(self, x: Tensor) -> Tensor:
        """Return the difference of a tensor from its means."""
        return x - x.mean(self.dims, keepdim=True)


def variance_term(graph: LossGraph, node: Any, weight: Tensor) -> CentredTerm | None:
    """Return the term of variances or standard deviations; ``None`` for other operations.

    With ``n`` entries each, of which ``c`` are not counted, and their differences ``x`` from the
    mean, it has the curvature ``2 w / (n - c)`` of ``w sum(x^2) / (n - c)`` by ``x``, and
    ``w / ((n - c) s)`` for a standard deviation ``s``.

    Args:
        graph: The graph of the loss, which must exist.
        node: The operation.
        weight: The derivative of the loss by its result; no entry may be negative.
    """
    kind, (edge, *_) = kind_of_node(node), inputs_of(node) or [None]
    if kind not in ("Var", "Std") or edge is None or not bool((weight >= 0).all()):
        return None
    x = node._saved_self.detach()
    given = saved_options(node, ("dim", "correction", "keepdim"))
    dims = tuple(d % x.ndim for d in given["dim"] or range(x.ndim))
    correction = 1 if given["correction"] is None else float(given["correction"])
    count = torch.Size(x.shape[d] for d in dims).numel() - correction
    share = weight.to(torch.promote_types(weight.dtype, torch.float32)) / count
    if kind == "Std":
        deviation = node._saved_result.detach()
        share = (share / deviation / 2).where(deviation > 0, 0)
    for dim in () if given["keepdim"] else sorted(dims):
        share = share.unsqueeze(dim)
    if x.is_complex() or not bool(share.isfinite().all() & (share > 0).any()):
        return None
    own = Diagonal(2 * share.expand(x.shape))
    return CentredTerm((edge,), (graph.map_to(edge),), own, kind, dims, kind == "Var")
