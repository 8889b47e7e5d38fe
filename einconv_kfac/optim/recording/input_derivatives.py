"""Derivatives of a call by its inputs, which a script takes between the call and the loss.

A physics-informed residual is one, as are a gradient penalty and forces::

    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)

The model gets another view of ``x``, at which its part of the derivative arrives alone. This is
then a tensor of the call, as if ``forward`` had computed and returned it. The vectors at which the
backward pass enters the call are inputs of the derivative, by which it may be differentiated again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from einconv_kfac.curvature.losses.snapshot import copied
from einconv_kfac.curvature.objective.graph import edge_of
from einconv_kfac.optim.recording.argument_copies import ArgumentCopies
from einconv_kfac.optim.replay.loss_input import Derivative, LossInput, Vector

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


class Call(Protocol):
    """A call of a model."""

    @property
    def is_replayed(self) -> bool:
        """Whether it is to be run again."""


CallT_contra = TypeVar("CallT_contra", bound=Call, contravariant=True)


class Notes(Protocol[CallT_contra]):
    """Receives what is found."""

    def found_(self, call: CallT_contra, source: Derivative, tensor: Tensor) -> None:
        """Receive a derivative of a call."""

    def depends_(self, call: CallT_contra, vector: Vector, tensor: Tensor) -> bool:
        """Receive a vector with its graph, and return whether the graph could be read."""


class InputDerivatives(Generic[CallT_contra]):
    """Watches the derivatives of one call.

    Its hooks belong to the graph of the call, to which it must not refer.

    Args:
        notes: Receives what is found; weakly referred to.
        call: The call, weakly referred to.

    Attributes:
        first: The sequence number of the first node of the call.
    """

    def __init__(self, notes: Notes[CallT_contra], call: CallT_contra) -> None:
        self.first = 0
        self._copies: ArgumentCopies | None = None
        self._notes, self._call = weakref.ref(notes), weakref.ref(call)
        self._pass = -1
        self._weights: dict[LossInput, Vector | None] = {}

    def watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of the call, with views of those that require gradients."""
        leaves, spec = tree_flatten((args, kwargs))
        views = [
            self._view(index, own) if takes_derivatives(own) else own
            for index, own in enumerate(leaves)
        ]
        nodes = [edge_of(new)[0] for own, new in zip(leaves, views) if new is not own]
        self.first = min((node._sequence_nr() for node in nodes), default=0)
        found: Arguments = tree_unflatten(views, spec)
        self._copies = ArgumentCopies((args, kwargs), found)
        return found

    def end_call_(self) -> None:
        """Give the script what the call has changed in lists and dictionaries."""
        if self._copies is not None:
            self._copies.end_call_()
        self._copies = None

    def _view(self, key: int | Vector, value: Tensor) -> Tensor:
        """Return what stands for an input."""
        view: Tensor = value.view_as(value)
        view.register_hook(partial(self._arrived_, key))  # type: ignore[no-untyped-call]
        return view

    def watch_(self, source: LossInput, tensor: Tensor, *, is_shared: bool = False) -> None:
        """Note the vectors with which derivatives of a tensor of the call are taken.

        Args:
            source: Which tensor of the call it is.
            tensor: The tensor.
            is_shared: Whether gradients may also reach it from inside of the call.
        """
        if tensor.requires_grad:
            hook = partial(self._reached_, source, is_shared)
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _reached_(self, source: LossInput, is_shared: bool, weight: Tensor) -> Tensor | None:
        """Note the vector at a tensor in a pass that keeps a graph."""
        notes, call = self._notes(), self._call()
        if not torch.is_grad_enabled() or notes is None or call is None:
            return None
        number = torch._C._current_graph_task_id()
        if number != self._pass:
            self._pass, self._weights = number, {}
        self._weights[source] = None
        if _is_batched(weight) or (is_shared and call.is_replayed):
            return None
        vector = Vector(copied(weight.detach()))
        if not weight.requires_grad:
            self._weights[source] = vector
            return None
        if not in_own_pass(partial(notes.depends_, call, vector, weight), weight):
            return None
        self._weights[source] = vector
        return self._view(vector, weight)

    def _arrived_(self, key: int | Vector, derivative: Tensor) -> Tensor | None:
        """Find a derivative, if all vectors that it was taken with are known."""
        is_new = torch._C._current_graph_task_id() == self._pass
        if not (torch.is_grad_enabled() and is_new and derivative.requires_grad):
            return None
        if _is_batched(derivative):
            return None
        weights = {source: own for source, own in self._weights.items() if own is not None}
        notes, call = self._notes(), self._call()
        if len(weights) < len(self._weights) or notes is None or call is None:
            return None
        source, own = Derivative(key, tuple(weights.items())), derivative.view_as(derivative)
        notes.found_(call, source, own)
        self.watch_(source, own)
        return own


def _is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor stands for one of several vectors (``is_grads_batched=True``)."""
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def in_own_pass(function: Callable[[], bool], like: Tensor) -> bool:
    """Call a function that calls nodes of graphs inside of a hook, and return what it returns.

    In a pass that takes derivatives by given tensors, nodes return nothing for others. Inside of a
    pass of its own they return everything.

    Args:
        function: The function.
        like: A tensor on the device of the pass.
    """
    found: list[bool] = []
    with torch.enable_grad():
        zero = torch.zeros((), device=like.device).requires_grad_().view(1)
    zero.register_hook(lambda _: found.append(function()))  # type: ignore[no-untyped-call]
    zero.backward()  # type: ignore[no-untyped-call]
    return found[0]


def takes_derivatives(value: Any) -> bool:
    """Return whether derivatives of a call by an argument may be taken."""
    if type(value) is not Tensor or not (value.requires_grad and torch.is_grad_enabled()):
        return False
    return value.layout is torch.strided and not is_functorch_wrapped_tensor(value)


def has_curved(values: Iterable[Any]) -> bool:
    """Return whether arguments, or entries of tuples, lists and dictionaries, require gradients."""
    for value in values:
        if isinstance(value, dict):
            value = value.values()  # noqa: PLW2901
        elif not isinstance(value, (tuple, list)):
            if getattr(value, "requires_grad", False):
                return True
            continue
        if has_curved(value):
            return True
    return False
