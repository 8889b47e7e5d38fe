"""Functions of class scores whose curvature is that of a categorical distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.local_curvature import Categorical, LocalCurvature
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import CURVATURE_ROUNDING, saved_options


@dataclass(frozen=True)
class Softmax(NodeRule):
    """The softmax of scores, or its logarithm.

    With log-probabilities ``log p`` and weights ``c``, the Hessian of ``sum_v c_v log p_v`` is
    ``-(sum_v c_v) (diag(p) - p p^T)``, that of any cross entropy. The softmax itself has none.

    Args:
        kind: See `NodeRule`.
        apply: The operation.
        inverse: Returns scores for the output.
        is_logarithm: Whether the output is a logarithm.
    """

    kind: str
    apply: Callable[..., Tensor]
    inverse: Callable[[Tensor], Tensor]
    is_logarithm: bool = False

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`; scores up to a constant."""
        return [self.inverse(node._saved_result.detach())]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(self.apply, **saved_options(node, ("dim",)))

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`."""
        dim, scores = saved_options(node, ("dim",))["dim"], inputs[0]
        assert scores is not None
        if not self.is_logarithm:
            return None
        return categorical(scores, -weight.sum(dim, keepdim=True), dim)


@dataclass(frozen=True)
class LogSumExp(NodeRule):
    """The logarithm of a sum of exponentials, as in a categorical distribution's log-density."""

    kind: str = "Logsumexp"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [node._saved_self.detach()]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(torch.logsumexp, **saved_options(node, ("dim", "keepdim")))

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`."""
        (scores,), dims = inputs, saved_options(node, ("dim",))["dim"]
        assert scores is not None
        if len(dims) != 1:
            return None
        kept = weight if node._saved_keepdim else weight.unsqueeze(dims[0])
        return categorical(scores, kept, dims[0])


def categorical(scores: Tensor, weight: Tensor, dim: int) -> Categorical | None:
    """Return ``w (diag(p) - p p^T)`` for scores ``[*a]``, if no weight is negative."""
    precise = torch.promote_types(scores.dtype, torch.float32)
    weight, dim = weight.to(precise), dim % scores.ndim
    largest = weight.max() if weight.numel() else weight.sum()
    if not bool(largest > 0) or bool(weight.min() < -CURVATURE_ROUNDING * largest):
        return None
    return Categorical(scores.to(precise).softmax(dim), weight.clamp_min(0), dim)


RULES = (
    Softmax("LogSoftmax", torch.log_softmax, lambda result: result, is_logarithm=True),
    Softmax("Softmax", torch.softmax, torch.log),
    Softmax("SafeSoftmax", torch._safe_softmax, torch.log),
    LogSumExp(),
)
