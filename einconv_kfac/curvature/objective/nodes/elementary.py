"""Functions of single entries, and losses that are sums of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.local_curvature import Diagonal, LocalCurvature
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule

CURVATURE_ROUNDING = 1e-6
"""Negative curvature, relative to the largest entry, that is attributed to rounding."""
REDUCTIONS = ("none", "mean", "sum")
"""The reductions of losses by the numbers that nodes save."""


def lost(result: Tensor, **options: Any) -> Tensor | None:
    """Return ``None``: what was overwritten cannot be restored."""
    return None


def before_leaky_relu(result: Tensor, *, negative_slope: float) -> Tensor | None:
    """Return the input of a leaky ReLU that overwrote it."""
    if not negative_slope > 0:
        return None
    return result.where(result > 0, result / negative_slope)


@dataclass(frozen=True)
class Entrywise(NodeRule):
    """A function of every entry, or a loss ``sum_j l_j(f_j)``; its Hessian is diagonal.

    Args:
        kind: See `NodeRule`.
        apply: The operation.
        options: Names of arguments that the node saves.
        inverse: Returns the input for the output, if the node saves the latter alone.
        restored: Returns the input for the output and the options, or ``None`` if it is lost, where
            the operation overwrote its input.
    """

    kind: str
    apply: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    inverse: Callable[[Tensor], Tensor] | None = None
    restored: Callable[..., Tensor | None] = lost

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        if self.inverse is not None:
            return [self.inverse(node._saved_result.detach())]
        if not hasattr(node, "_saved_self"):  # overwritten in place
            options = saved_options(node, self.options)
            return [self.restored(node._saved_result.detach(), **options)]
        return [node._saved_self.detach()]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return partial(self.apply, **saved_options(node, self.options))

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`."""
        function, x = self.function(node), inputs[0]
        assert function is not None
        return None if x is None else diagonal(function, x, weight)


@dataclass(frozen=True)
class WithTarget(Entrywise):
    """A loss of its input and of a target that may depend on the model as well."""

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [node._saved_self.detach(), node._saved_target.detach()]


@dataclass(frozen=True)
class Difference(WithTarget):
    """A loss of the difference between its input and its target, which may both depend."""

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`; by the difference."""
        function, (x, target) = self.function(node), inputs
        assert function is not None
        assert x is not None
        assert target is not None
        own = target.to(torch.promote_types(target.dtype, torch.float32))
        found = diagonal(lambda entries: function(entries, own), x, weight, may_vanish=True)
        return None if found is None else Diagonal(found.values, is_whole=True)


@dataclass(frozen=True)
class Power(NodeRule):
    """A power of numbers or tensors, each of which may depend on the model."""

    kind: str = "Pow"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`; numbers are none."""
        saved = (node._saved_self, node._saved_exponent)
        return [each.detach() for each in saved if isinstance(each, Tensor)]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        if not isinstance(node._saved_self, Tensor):
            return partial(torch.pow, node._saved_self)
        if not isinstance(node._saved_exponent, Tensor):
            return partial(torch.pow, exponent=node._saved_exponent)
        return torch.pow

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`; unknown if basis and exponent depend on the model."""
        function = self.function(node)
        assert function is not None
        depend = [edge is not None for edge, _ in node.next_functions]
        if sum(depend) != 1:
            return None
        own = depend.index(True)
        x = inputs[own]
        assert x is not None

        def of_one(entries: Tensor) -> Tensor:
            return function(*inputs[:own], entries, *inputs[own + 1 :])

        return diagonal(of_one, x, weight)


def is_square(node: Any) -> bool:
    """Return whether a node of a power has the exponent two."""
    exponent = node._saved_exponent
    if not isinstance(node._saved_self, Tensor):
        return False
    if not isinstance(exponent, Tensor):
        return bool(exponent == 2)
    return node.next_functions[1][0] is None and bool((exponent.detach() == 2).all())


@dataclass(frozen=True)
class Rectifier(NodeRule):
    """The positive part, whose node keeps no input: it must be an output of the model."""

    kind: str = "Relu"

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [None]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return torch.relu


def diagonal(
    function: Function, x: Tensor, weight: Tensor, *, may_vanish: bool = False
) -> Diagonal | None:
    """Return the diagonal Hessian of ``<weight, f(x)>``, if it is curved and not negative.

    A function of complex numbers, such as their absolute value, has none.

    Args:
        function: ``f``, of single entries.
        x: The entries.
        weight: The weights, shaped like the result.
        may_vanish: Whether to return a Hessian that is zero, if no weight is negative.
    """
    if x.is_complex():
        return None
    precise = torch.promote_types(x.dtype, torch.float32)
    with torch.enable_grad():
        entries = x.detach().to(precise).requires_grad_()
        value = (function(entries) * weight).sum()
        (slope,) = torch.autograd.grad(value, entries, create_graph=True)
        if not slope.requires_grad:
            return None
        (found,) = torch.autograd.grad(slope.sum(), entries, allow_unused=True)
    if found is None:
        return None
    found = found.nan_to_num(0.0, 0.0, 0.0)
    largest = found.max() if found.numel() else found.sum()
    if found.numel() and bool(found.min() < -CURVATURE_ROUNDING * largest):
        return None
    if not bool(largest > 0) and not (may_vanish and bool((weight >= 0).all())):
        return None
    return Diagonal(found.clamp_min_(0))


def saved_options(node: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the options of an operation that its node saves, by name."""
    options = {name: _plain(getattr(node, f"_saved_{name}")) for name in names}
    if "reduction" in options:
        options["reduction"] = REDUCTIONS[options["reduction"]]
    return options


def _plain(value: Any) -> Any:
    """Return a saved value as an argument; torch shows negative dimensions as unsigned numbers."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_plain(entry) for entry in value)
    return value - (1 << 64) if type(value) is int and value >= 1 << 63 else value


def _from_power(power: float) -> Callable[[Tensor], Tensor]:
    """Return the inverse of a power."""
    return lambda result: result.pow(1 / power)


RULES = (
    Rectifier(),
    Power(),
    Entrywise("Exp", torch.exp, inverse=torch.log),
    Entrywise("Exp2", torch.exp2, inverse=torch.log2),
    Entrywise("Expm1", torch.expm1, inverse=torch.log1p),
    Entrywise("Log", torch.log),
    Entrywise("Log1P", torch.log1p),
    Entrywise("Log2", torch.log2),
    Entrywise("Log10", torch.log10),
    Entrywise("Sqrt", torch.sqrt, inverse=_from_power(0.5)),
    Entrywise("Rsqrt", torch.rsqrt, inverse=_from_power(-0.5)),
    Entrywise("Reciprocal", torch.reciprocal, inverse=torch.reciprocal),
    Entrywise("Sigmoid", torch.sigmoid, inverse=torch.logit),
    Entrywise("Tanh", torch.tanh, inverse=torch.atanh),
    Entrywise("Sin", torch.sin),
    Entrywise("Cos", torch.cos),
    Entrywise("Tan", torch.tan, inverse=torch.atan),
    Entrywise("Asin", torch.asin),
    Entrywise("Acos", torch.acos),
    Entrywise("Atan", torch.atan),
    Entrywise("Cosh", torch.cosh),
    Entrywise("Sinh", torch.sinh),
    Entrywise("Erf", torch.erf),
    Entrywise("Erfc", torch.erfc),
    Entrywise("Erfinv", torch.erfinv),
    Entrywise("Logit", torch.logit, ("eps",)),
    Entrywise("Asinh", torch.asinh),
    Entrywise("Acosh", torch.acosh),
    Entrywise("Atanh", torch.atanh),
    Entrywise("Lgamma", torch.lgamma),
    Entrywise("Mvlgamma", torch.mvlgamma, ("p",)),
    Entrywise("Digamma", torch.digamma),
    Entrywise("Sinc", torch.sinc),
    Entrywise("SpecialEntr", torch.special.entr),
    Entrywise("SpecialErfcx", torch.special.erfcx),
    Entrywise("SpecialLogNdtr", torch.special.log_ndtr),
    Entrywise("SpecialNdtri", torch.special.ndtri, inverse=torch.special.ndtr),
    Entrywise("I0", torch.i0),
    Entrywise("SpecialI0E", torch.special.i0e),
    Entrywise("SpecialI1", torch.special.i1),
    Entrywise("SpecialI1E", torch.special.i1e),
    Entrywise("NanToNum", torch.nan_to_num),
    Entrywise("Abs", torch.abs),
    Entrywise("Softplus", functional.softplus, ("beta", "threshold")),
    Entrywise("LogSigmoid", functional.logsigmoid),
    Entrywise("Gelu", functional.gelu, ("approximate",)),
    Entrywise("Silu", functional.silu),
    Entrywise("Mish", functional.mish),
    Entrywise("LeakyRelu", functional.leaky_relu, ("negative_slope",), restored=before_leaky_relu),
    Entrywise("Elu", torch.ops.aten.elu, ("alpha", "scale", "input_scale")),
    Entrywise("Celu", functional.celu, ("alpha",)),
    Entrywise("Softshrink", functional.softshrink, ("lambd",)),
    Entrywise("Hardshrink", functional.hardshrink, ("lambd",)),
    Entrywise("PreluKernel", torch.ops.aten._prelu_kernel, ("weight",)),
    Entrywise("Hardswish", functional.hardswish),
    Entrywise("Hardtanh", functional.hardtanh, ("min_val", "max_val")),
    Entrywise("Clamp", torch.clamp, ("min", "max")),
    Entrywise("ClampMin", torch.clamp_min, ("min",)),
    Entrywise("ClampMax", torch.clamp_max, ("max",)),
    Difference("MseLoss", functional.mse_loss, ("reduction",)),
    Difference("HuberLoss", functional.huber_loss, ("delta", "reduction")),
    Difference("SmoothL1Loss", functional.smooth_l1_loss, ("beta", "reduction")),
    Entrywise("SoftMarginLoss", functional.soft_margin_loss, ("target", "reduction")),
)
