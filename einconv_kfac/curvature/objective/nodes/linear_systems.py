"""Linear systems, inverses and Cholesky factors, as in the density of a Gaussian vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import saved_options


@dataclass(frozen=True)
class TriangularSolve(NodeRule):
    """The solution ``x`` of ``a x = b`` for a triangular ``a``; the node saves ``a`` and ``x``."""

    kind: str = "LinalgSolveTriangular"

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`; in ``b`` alone."""
        return not dependent[0]

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        a, x = node._saved_self.detach(), node._saved_result.detach()
        triangle = a.triu() if node._saved_upper else a.tril()
        if node._saved_unitriangular:
            triangle = triangle - triangle.diagonal(dim1=-2, dim2=-1).diag_embed()
            triangle = triangle + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return [a, triangle @ x if node._saved_left else x @ triangle]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        options = saved_options(node, ("upper", "left", "unitriangular"))
        return partial(torch.linalg.solve_triangular, **options)


@dataclass(frozen=True)
class CholeskyFactor(NodeRule):
    """The Cholesky factor ``l`` of a matrix ``l l^T``; the node saves ``l``."""

    kind: str = "LinalgCholeskyEx"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        factor = node._saved_L.detach()
        return [factor.mH @ factor if node._saved_upper else factor @ factor.mH]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.linalg.cholesky, **saved_options(node, ("upper",)))


@dataclass(frozen=True)
class Solve(NodeRule):
    """The solution ``x`` of ``a x = b`` or ``x a = b``; the node saves ``a`` and ``x``."""

    kind: str = "LinalgSolveEx"

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`; in ``b`` alone."""
        return not dependent[0]

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        a, x = node._saved_A.detach(), node._saved_result.detach()
        is_vector = x.ndim == a.ndim - 1
        columns = x.unsqueeze(-1) if is_vector else x
        b = a @ columns if node._saved_left else columns @ a
        return [a, b.squeeze(-1) if is_vector else b]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.linalg.solve, **saved_options(node, ("left",)))


@dataclass(frozen=True)
class Inverse(NodeRule):
    """The inverse of a matrix, which the node saves."""

    kind: str = "LinalgInvEx"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [torch.linalg.inv(node._saved_inverse.detach())]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.linalg.inv)


RULES = (TriangularSolve(), CholeskyFactor(), Solve(), Inverse())
