"""Eigenvalues and singular values, of which the node saves the whole decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.node_rule import Function, NodeRule


@dataclass(frozen=True)
class Eigenvalues(NodeRule):
    """The eigenvalues of a Hermitian matrix; eigenvectors are not known."""

    kind: str = "LinalgEigh"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        vectors = node._saved_eigenvectors.detach()
        scaled = vectors * node._saved_eigenvalues.detach().to(vectors.dtype).unsqueeze(-2)
        return [scaled @ vectors.mH]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.linalg.eigvalsh)


@dataclass(frozen=True)
class SingularValues(NodeRule):
    """The singular values of a matrix; singular vectors are not known."""

    kind: str = "LinalgSvd"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        values = node._saved_S.detach()
        left = node._saved_U.detach()[..., : values.shape[-1]]
        right = node._saved_Vh.detach()[..., : values.shape[-1], :]
        return [(left * values.to(left.dtype).unsqueeze(-2)) @ right]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.linalg.svdvals)


RULES = (Eigenvalues(), SingularValues(output=1))
