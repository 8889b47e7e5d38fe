"""Functions of entries in place of a tensor that is a view, or of a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import kind_of_node, zeros_at
from einconv_kfac.curvature.objective.local_curvature import Diagonal, LocalCurvature
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import (
    before_leaky_relu,
    diagonal,
    saved_options,
)
from einconv_kfac.curvature.objective.nodes.slices import GradientGraph


@dataclass(frozen=True)
class EntrywiseFunction:
    """A function of entries, by the derivative of its derivative.

    Args:
        apply: The function.
        options: Names of the arguments that this node saves.
        before: Returns the input for what the node saves; ``None`` if it does not follow.
        saved: The name under which the node saves it.
    """

    apply: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    before: Callable[..., Tensor | None] = lambda saved, **_: saved
    saved: str = "self"


def _unknown(_: Tensor) -> None:
    """Return nothing: what is negative before a positive part is lost."""


def _power(x: Tensor, *, exponent: float) -> Tensor:
    """Return the power whose derivative has this exponent."""
    return x.pow(exponent + 1)


def _before_sigmoid(result: Tensor) -> Tensor:
    """Return the input of a sigmoid."""
    return result.logit()


def _before_tanh(result: Tensor) -> Tensor:
    """Return the input of a hyperbolic tangent."""
    return result.atanh()


_FUNCTIONS = {
    "ThresholdBackward": EntrywiseFunction(torch.relu, before=_unknown),
    "LeakyReluBackward": EntrywiseFunction(
        functional.leaky_relu, ("negative_slope",), before_leaky_relu
    ),
    "HardtanhBackward": EntrywiseFunction(functional.hardtanh, ("min_val", "max_val")),
    "SigmoidBackward": EntrywiseFunction(torch.sigmoid, (), _before_sigmoid, "output"),
    "TanhBackward": EntrywiseFunction(torch.tanh, (), _before_tanh, "output"),
    "Pow": EntrywiseFunction(_power, ("exponent",)),
}


@dataclass(frozen=True)
class Applied:
    """A function in place of a part of a tensor, or of all of it.

    Args:
        function: The function of entries.
        before: The part before it, ``[*r]``; ``None`` if that is lost.
        strides: The strides of the tensor.
        part: Size, strides and offset of the part.
    """

    function: Function
    before: Tensor | None
    strides: tuple[int, ...]
    part: tuple[Sequence[int], Sequence[int], int]

    def __call__(self, x: Tensor) -> Tensor:
        """Return another tensor after the function."""
        return self.placed(self.function(self.taken(x)), x)

    def taken(self, x: Tensor) -> Tensor:
        """Return the part of a tensor."""
        return self._laid_out(x).as_strided(*self.part)

    def placed(self, values: Tensor, x: Tensor) -> Tensor:
        """Return a tensor with other values in the part."""
        own = self._laid_out(x.to(values.dtype))
        return torch.as_strided_scatter(own, values, *self.part)

    def _laid_out(self, x: Tensor) -> Tensor:
        """Return a tensor with the strides that the part refers to."""
        if x.stride() == self.strides and not x.storage_offset():
            return x
        return torch.empty_strided(x.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)


@dataclass(frozen=True)
class InPlace(NodeRule):
    """A function of entries that overwrites a view; other operations in place are not known.

    The node does not tell which operation it applies. The graph of its gradient shows it.
    """

    kind: str = "CopySlices"

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`; an assignment needs the node, see `is_affine`."""
        return False

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`; zeros stand for entries that stay as they are."""
        found = applied_at(node)
        if found is None or found.before is None:
            return [None]
        return [found.placed(found.before, zeros_at((node, 0)))]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        return applied_at(node)

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """See `NodeRule`."""
        found = applied_at(node)
        if found is None or found.before is None:
            return None
        own = diagonal(found.function, found.before, found.taken(weight))
        return None if own is None else Diagonal(found.placed(own.values, torch.zeros_like(weight)))


def applied_at(node: Any) -> Applied | None:
    """Return the function that a node applies in place to a tensor or to a part of one.

    Args:
        node: A node of the kind ``CopySlices``.

    Returns:
        The function; ``None`` if it is another operation, or its part is not known.
    """
    graph = GradientGraph(node)
    found = graph.of_kinds(_FUNCTIONS)
    if graph.is_affine or len(found) != 1:
        return None
    own = _FUNCTIONS[kind_of_node(found[0])]
    saved = getattr(found[0], f"_saved_{own.saved}").detach()
    options = saved_options(found[0], own.options)
    if (part := graph.part()) is None or tuple(part[0]) != saved.shape:
        return None
    before = own.before(saved, **options)
    return Applied(partial(own.apply, **options), before, graph.strides, part)


RULES = (InPlace(),)
