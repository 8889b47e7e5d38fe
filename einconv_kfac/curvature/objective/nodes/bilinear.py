"""Products and quotients of tensors that both depend on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.node_rule import Function
from einconv_kfac.curvature.objective.nodes.elementary import saved_options


@dataclass(frozen=True)
class Product:
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

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`; it is indefinite."""
        return None


_EITHER = (frozenset({0}), frozenset({1}))

RULES = (
    Product("Mul", torch.mul, ("self", "other"), _EITHER),
    Product("Div", torch.div, ("self", "other"), (frozenset({0}),)),
    Product("Mm", torch.mm, ("self", "mat2"), _EITHER),
    Product("Bmm", torch.bmm, ("self", "mat2"), _EITHER),
    Product("Mv", torch.mv, ("self", "vec"), _EITHER),
    Product("Dot", torch.dot, ("self", "tensor"), _EITHER),
    Product("Addmm", None, (None, "mat1", "mat2"), (frozenset({0, 1}), frozenset({0, 2}))),
    Product("Convolution", None, ("input", "weight", None), (frozenset({0}), frozenset({1, 2}))),
    Product("GridSampler2D", None, ("input", "grid"), (frozenset({0}),)),
    Product("Xlogy", torch.xlogy, ("self", "other"), (frozenset({0}),)),
    Product("Atan2", torch.atan2, ("self", "other"), ()),
    Product("Logaddexp", torch.logaddexp, ("self", "other"), ()),
    Product("Cdist", torch.cdist, ("x1", "x2"), (), ("p",)),
    Product("EuclideanDist", torch.cdist, ("x1", "x2"), ()),
    Product("Maximum", torch.maximum, ("self", "other"), ()),
    Product("Minimum", torch.minimum, ("self", "other"), ()),
)
