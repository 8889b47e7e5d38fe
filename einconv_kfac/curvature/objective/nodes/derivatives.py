"""Derivatives of operations, which a script takes between a model and a loss.

They are functions of the vector that the derivative is taken with, and of what the operation kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import saved_options

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@dataclass(frozen=True)
class OfDerivative(NodeRule):
    """The derivative of an operation.

    Args:
        apply: The derivative, of the vector and of what was kept.
        kept: Names of the tensors that were kept.
        options: Names of arguments that the node saves.
    """

    apply: Callable[..., Tensor]
    kept: tuple[str, ...] = ("output",)
    options: tuple[str, ...] = ()

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`; it is linear in the vector."""
        return not any(dependent[1:])

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [getattr(node, f"_saved_{name}").detach() for name in ("grad_output", *self.kept)]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        options = saved_options(node, self.options)
        if "reduction" in options:
            options["reduction"] = _REDUCTIONS[options["reduction"]]
        return partial(self.apply, **options)


def _tanh(vector: Tensor, output: Tensor) -> Tensor:
    """Return the derivative of a hyperbolic tangent."""
    return vector * (1 - output.square())


def _sigmoid(vector: Tensor, output: Tensor) -> Tensor:
    """Return the derivative of a logistic function."""
    return vector * output * (1 - output)


def _log_sigmoid(vector: Tensor, before: Tensor) -> Tensor:
    """Return the derivative of the logarithm of a logistic function."""
    return vector * torch.sigmoid(-before)


def _softmax(vector: Tensor, output: Tensor, *, dim: int) -> Tensor:
    """Return the derivative of a softmax."""
    product = vector * output
    return product - output * product.sum(dim, keepdim=True)


def _log_softmax(vector: Tensor, output: Tensor, *, dim: int) -> Tensor:
    """Return the derivative of the logarithm of a softmax."""
    return vector - output.exp() * vector.sum(dim, keepdim=True)


_aten: Any = torch.ops.aten
_PAIR = ("self", "target")
RULES = (
    OfDerivative("TanhBackward", _tanh),
    OfDerivative("SigmoidBackward", _sigmoid),
    OfDerivative("SoftmaxBackwardData", _softmax, options=("dim",)),
    OfDerivative("LogSoftmaxBackwardData", _log_softmax, options=("dim",)),
    OfDerivative("SoftplusBackward", _aten.softplus_backward, ("self",), ("beta", "threshold")),
    OfDerivative("GeluBackward", _aten.gelu_backward, ("self",), ("approximate",)),
    OfDerivative("LogSigmoidBackward", _log_sigmoid, ("self",)),
    OfDerivative("MseLossBackward", _aten.mse_loss_backward, _PAIR, ("reduction",)),
    OfDerivative("HuberLossBackward", _aten.huber_loss_backward, _PAIR, ("reduction", "delta")),
    OfDerivative(
        "SmoothL1LossBackward", _aten.smooth_l1_loss_backward, _PAIR, ("reduction", "beta")
    ),
)
