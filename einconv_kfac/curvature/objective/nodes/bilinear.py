"""Products and quotients of tensors that both depend on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import zeros_at
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import diagonal, saved_options


@dataclass(frozen=True)
class Product(NodeRule):
    """An operation that is linear in some of its inputs while the others are constant.

    Args:
        kind: See `NodeRule`.
        apply: The operation.
        saved: The names under which the node saves the inputs; ``None`` for one that it does not.
        linear: Sets of inputs, by index, in which the operation is linear together.
        options: Names of arguments that the node saves.
    """

    kind: str
    apply: Callable[..., Tensor] | None
    saved: tuple[str | None, ...]
    linear: tuple[frozenset[int], ...]
    options: tuple[str, ...] = ()

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`."""
        own = {index for index, depends in enumerate(dependent) if depends}
        return any(own <= together for together in self.linear)

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        found = [None if n is None else getattr(node, f"_saved_{n}", None) for n in self.saved]
        return [None if value is None else value.detach() for value in found]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        if self.apply is None:
            return None
        return partial(self.apply, **saved_options(node, self.options))


@dataclass(frozen=True)
class AddedProduct(Product):
    """A product that is added to the first input, which the node does not save.

    Zeros take its place: the output changes as much as this input does.
    """

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        return [zeros_at((node, 0)), *super().inputs(node)[1:]]


@dataclass(frozen=True)
class Convolved(Product):
    """A convolution, whose bias the node does not save; zeros take its place."""

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        x, weight = super().inputs(node)
        size = node._saved_bias_sym_sizes_opt
        if not any(size or ()) or weight is None:
            return [x, weight]
        return [x, weight, weight.new_zeros(tuple(size))]


@dataclass(frozen=True)
class Hypotenuse(Product):
    """A root of two squares, which saves no side that is constant."""

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        sides, result = super().inputs(node), node._saved_result.detach()
        other = next(side for side in sides if side is not None)
        rest = (result.square() - other.square()).clamp_min(0).sqrt()
        return [rest if side is None else side for side in sides]


@dataclass(frozen=True)
class Quotient(Product):
    """A quotient ``a / b``, which may be rounded."""

    def function(self, node: Any) -> Function:
        """See `NodeRule`."""
        return partial(torch.div, rounding_mode=getattr(node, "_saved_rounding_mode", None))

    def by_denominator(self, node: Any, weight: Tensor) -> Diagonal | None:
        """Return the curvature of ``<weight, a / b>`` by ``b``; see `NodeRule.curvature`."""
        a, b = self.inputs(node)
        if a is None or b is None:
            return None
        return diagonal(partial(self.function(node), a), b, weight)

    def by_scale(self, node: Any, weight: Tensor) -> Diagonal | None:
        """Return the curvature of ``<weight, a / b>`` by ``s = log |b|``, as one by ``b``.

        A loss ``a / b + log b``, as of a normal distribution with the variance ``b``, is convex in
        ``s``; its Hessian ``a / b`` has the Fisher information of this scale as its mean. ``None``
        where that is negative or ``b`` is zero.
        """
        a, b = self.inputs(node)
        if a is None or b is None or getattr(node, "_saved_rounding_mode", None) is not None:
            return None
        own = weight * (a / b)
        if bool(((own < 0) | (b == 0)).any()):
            return None
        return Diagonal((own / b.square()).sum_to_size(b.shape))

    def by_location(self, node: Any, weight: Tensor) -> Diagonal:
        """Return the curvature of ``<weight, |x| / b>`` by ``x``.

        It is the Fisher information ``1 / b^2`` of Laplace distributions with the scale ``b``.
        """
        a, b = self.inputs(node)
        assert a is not None
        assert b is not None
        return Diagonal((weight.abs() / b.square()).sum_to_size(a.shape))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Return a convolution, which may be transposed."""
    result: Tensor = torch.ops.aten.convolution(x, weight, bias, **options)
    return result


def _sums(first: str, second: str, *options: str) -> dict[str, Any]:
    """Return arguments of `AddedProduct`: the names of the factors and of options."""
    linear = (frozenset({0, 1}), frozenset({0, 2}))
    return {"saved": (None, first, second), "linear": linear, "options": options}


_EITHER = (frozenset({0}), frozenset({1}))

RULES = (
    Product("Mul", torch.mul, ("self", "other"), _EITHER),
    Quotient("Div", torch.div, ("self", "other"), (frozenset({0}),)),
    Product("Mm", torch.mm, ("self", "mat2"), _EITHER),
    Product("Bmm", torch.bmm, ("self", "mat2"), _EITHER),
    Product("Mv", torch.mv, ("self", "vec"), _EITHER),
    Product("Dot", torch.dot, ("self", "tensor"), _EITHER),
    Product("Vdot", torch.vdot, ("self", "other"), _EITHER),
    AddedProduct("Addmm", torch.addmm, **_sums("mat1", "mat2", "beta", "alpha")),
    AddedProduct("Baddbmm", torch.baddbmm, **_sums("batch1", "batch2", "beta", "alpha")),
    AddedProduct("Addbmm", torch.addbmm, **_sums("batch1", "batch2", "beta", "alpha")),
    AddedProduct("Addmv", torch.addmv, **_sums("mat", "vec", "beta", "alpha")),
    AddedProduct("Addr", torch.addr, **_sums("vec1", "vec2", "beta", "alpha")),
    AddedProduct("Addcmul", torch.addcmul, **_sums("tensor1", "tensor2", "value")),
    AddedProduct(
        "Addcdiv", torch.addcdiv, (None, "tensor1", "tensor2"), (frozenset({0, 1}),), ("value",)
    ),
    Product(
        "Trilinear",
        torch._trilinear,
        ("i1", "i2", "i3"),
        tuple(frozenset({index}) for index in range(3)),
        ("expand1", "expand2", "expand3", "sumdim"),
    ),
    Product("LinalgCross", torch.linalg.cross, ("self", "other"), _EITHER, ("dim",)),
    Product(
        "CholeskySolve", torch.cholesky_solve, ("self", "input2"), (frozenset({0}),), ("upper",)
    ),
    Product("Dist", torch.dist, ("self", "other"), (), ("p",)),
    Hypotenuse("Hypot", torch.hypot, ("self", "other"), ()),
    Product("Lerp", torch.lerp, ("self", "end", "weight"), (frozenset({0, 1}), frozenset({2}))),
    Convolved(
        "Convolution",
        _convolved,
        ("input", "weight"),
        (frozenset({0}), frozenset({1, 2})),
        ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
    ),
    Product("GridSampler2D", None, ("input", "grid"), (frozenset({0}),)),
    Product("Xlogy", torch.xlogy, ("self", "other"), (frozenset({0}),)),
    Product("Atan2", torch.atan2, ("self", "other"), ()),
    Product("Logaddexp", torch.logaddexp, ("self", "other"), ()),
    Product("Logaddexp2", torch.logaddexp2, ("self", "other"), ()),
    Product("SpecialXlog1Py", torch.special.xlog1py, ("self", "other"), (frozenset({0}),)),
    Product("Cdist", torch.cdist, ("x1", "x2"), (), ("p",)),
    Product("EuclideanDist", torch.cdist, ("x1", "x2"), ()),
    Product("Maximum", torch.maximum, ("self", "other"), ()),
    Product("Minimum", torch.minimum, ("self", "other"), ()),
    Product("Fmax", torch.fmax, ("self", "other"), ()),
    Product("Fmin", torch.fmin, ("self", "other"), ()),
)
