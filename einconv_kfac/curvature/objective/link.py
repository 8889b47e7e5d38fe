"""A tensor as a function of outputs of a model, after the graph between them is freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.loss_graph import Values
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.curvature.objective.tail import Tail
from einconv_kfac.torch_versions import make_dual


@dataclass(frozen=True)
class Link:
    """A tensor that depends on outputs of a model, and on its parameters.

    Args:
        sources: The edges of these outputs and parameters.
        tail: The tensor as a function of them.
        derivative: Its derivative by them.
    """

    sources: tuple[Edge, ...]
    tail: Tail
    derivative: LinearMap

    @staticmethod
    def of(
        root: Edge, tensor: Tensor, output: Values, parameters: Mapping[Tensor, str]
    ) -> Link | None:
        """Return the link, or ``None`` if the tensor depends neither on outputs nor parameters.

        Args:
            root: The edge of the tensor.
            tensor: The tensor, detached.
            output: See `Reading`.
            parameters: See `Reading`.
        """
        reading = Reading(root, tensor, torch.ones_like(tensor), output, parameters)
        if not reading.graph.sources:
            return None
        tail = reading.tail(reading.graph.sources)
        return Link(tuple(reading.graph.sources), tail, reading.graph.derivative())

    @property
    def unknown(self) -> Sequence[str]:
        """Names of the operations because of which it cannot be evaluated again."""
        return self.tail.unknown()

    def __call__(self, sources: Sequence[Tensor]) -> Tensor:
        """Return the tensor for values of its sources.

        Tangents of forward mode and graphs are carried on to first order, which is all that
        products with a Jacobian need.

        Args:
            sources: The values, with tangents or with a graph.
        """
        parts = [_unpacked(each) for each in sources]
        value = self.tail.result([primal.detach() for primal, _ in parts])
        tangents = {e: t for e, (_, t) in zip(self.sources, parts) if t is not None}
        if tangents:
            tangent = self.derivative(tangents)
            return value if tangent is None else _dual(value, tangent.to(value.dtype))
        curved = {e: s - s.detach() for e, s in zip(self.sources, sources) if s.requires_grad}
        if not (curved and torch.is_grad_enabled()):
            return value
        change = self.derivative(curved, create_graph=True)
        return value if change is None else value + change


def _unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value and the tangent of a tensor."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, tangent


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Return a value with a tangent."""
    return make_dual(value, tangent)
