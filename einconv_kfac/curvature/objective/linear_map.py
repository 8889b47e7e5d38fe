"""Linear maps between tensors of the autograd graph, which outlive the graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from einconv_kfac.curvature.losses.snapshot import copied
from einconv_kfac.curvature.objective.graph import (
    Edge,
    NodeOrder,
    Stops,
    backpropagated,
    zeros_at,
)

_ONCE = (
    "The operations between the model's output and the loss must be differentiable twice, got one "
    "that is not: {} Write it with other operations, as (x[:, None] - y).abs().pow(3).sum(-1) in "
    "place of torch.cdist(x, y, p=3) ** 3."
)
_CHANGED = (
    "Tensors that the loss is computed from must not change before the step when adaptive=True, "
    "got one that was overwritten in place, as by the step of another optimizer. Pass a copy "
    "(`.clone()`), or take the step of this optimizer first, or pass adaptive=False."
)
_WITHOUT = "is not implemented"
"""What torch says of kernels without a derivative, as that of `hardsigmoid`."""


class OnceDifferentiableError(RuntimeError):
    """An operation has a first derivative that cannot be differentiated."""


class LinearMap:
    """The derivative ``J`` of a tensor by the tensors that it depends on.

    ``J^T w`` is computed once, with a graph of its own. It is linear in ``w``, so that ``J v`` is
    the derivative of ``<J^T w, v>`` by ``w`` (Pearlmutter, 1994, in the form that needs no forward
    mode). The graph of the forward pass may be freed afterwards.

    Args:
        target: The tensor.
        nodes: The nodes of the graph, in the order of `dependents`.
        stops: Whether the derivative is taken by a tensor.

    Attributes:
        sources: The tensors that the target depends on.
    """

    def __init__(self, target: Edge, nodes: NodeOrder, stops: Stops) -> None:
        self._transposed: dict[Edge, Tensor] | None = None
        self.sources = [target]
        if not stops(target):
            with torch.enable_grad(), saved_tensors_hooks(_kept, _checked):
                # any ``w`` would do, but of zero some derivatives, as of logcumsumexp, are NaN
                self._w = torch.ones_like(zeros_at(target)).requires_grad_()
                found = backpropagated({target: self._w}, nodes, stops)
            self._transposed = {e: t for e, t in found.items() if t.requires_grad}
            self.sources = list(self._transposed)

    def __call__(
        self, vectors: Mapping[Edge, Tensor], *, create_graph: bool = False
    ) -> Tensor | None:
        """Return ``J v``, or ``None`` if it is zero.

        Args:
            vectors: The parts of ``v`` by source; those that are not given are zero.
            create_graph: Whether the result has a graph to ``v``.
        """
        if self._transposed is None:
            return vectors.get(self.sources[0])
        own = [(t, vectors[e].to(t.dtype)) for e, t in self._transposed.items() if e in vectors]
        if not own:
            return None
        outputs, parts = zip(*own)
        graph = {"retain_graph": True, "create_graph": create_graph}
        try:
            (product,) = torch.autograd.grad(outputs, self._w, parts, **graph, allow_unused=True)
        except RuntimeError as error:  # as of `torch.cdist`, or of a kernel without a derivative
            if not isinstance(error, NotImplementedError) and _WITHOUT not in str(error):
                raise
            raise OnceDifferentiableError(_ONCE.format(error)) from error
        return product if product is None or create_graph else product.detach()

    @property
    def is_identity(self) -> bool:
        """Whether the target is itself a source."""
        return self._transposed is None

    def transposed(self, vector: Tensor) -> dict[Edge, Tensor]:
        """Return ``J^T w`` by source, also after the graph of the forward pass is freed."""
        if self._transposed is None:
            return {self.sources[0]: vector}
        with torch.enable_grad():
            own = {e: torch.zeros_like(t).requires_grad_() for e, t in self._transposed.items()}
            product = self(own, create_graph=True)
        if product is None or not product.requires_grad:
            return {}
        inputs = list(own.values())
        found = torch.autograd.grad(product, inputs, vector.to(product), allow_unused=True)
        return {edge: part for edge, part in zip(own, found) if part is not None}


def _kept(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a tensor that a backward pass needs, and its version.

    Parameters of others, such as learned weights of several losses or the proxies of classes, are
    copied: the step of their optimizer may come before that of this one. So are small constants.
    """
    base = tensor if tensor._base is None else tensor._base
    is_other = base.is_leaf and base.requires_grad
    own = tensor.detach().clone() if is_other else copied(tensor)
    return own, 0 if own.is_inference() else own._version


def _checked(kept: tuple[Tensor, int]) -> Tensor:
    """Return what `_kept` kept, if it was not changed since.

    Raises:
        RuntimeError: If it was.
    """
    tensor, version = kept
    if not tensor.is_inference() and tensor._version != version:
        raise RuntimeError(_CHANGED)
    return tensor
