"""Derivatives of a call by its arguments, which a script takes between the call and the loss.

A physics-informed residual is one, as are a gradient penalty and forces::

    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)

The model gets another view of ``x``, at which its part of the derivative arrives alone. This is
then a tensor of the call, as if ``forward`` had computed and returned it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from einconv_kfac.optim.replay.loss_input import Derivative, LossInput

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


class InputDerivatives:
    """Watches the derivatives of one call.

    Its hooks belong to the graph of the call, to which it must not refer.

    Args:
        found: Receives each derivative, weakly referred to.
    """

    def __init__(self, found: Callable[..., None], *owners: Any) -> None:
        self._found = weakref.WeakMethod(found)
        self._owners = [weakref.ref(owner) for owner in owners]
        self._pass = -1
        self._weights: dict[LossInput, Tensor | None] = {}

    def watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of the call, with views of those that require gradients."""
        given = tuple(self._view(index, own) for index, own in enumerate(args))
        return given, {name: self._view(name, own) for name, own in kwargs.items()}

    def _view(self, key: int | str, value: Any) -> Any:
        """Return what stands for an argument."""
        if not takes_derivatives(value):
            return value
        view: Tensor = value.view_as(value)
        view.register_hook(partial(self._arrived_, key))  # type: ignore[no-untyped-call]
        return view

    def watch_(self, source: LossInput, tensor: Tensor) -> None:
        """Note the vectors with which derivatives of a tensor of the call are taken."""
        if tensor.requires_grad:
            tensor.register_hook(partial(self._reached_, source))  # type: ignore[no-untyped-call]

    def _reached_(self, source: LossInput, weight: Tensor) -> None:
        """Note the vector at a tensor in a pass that keeps a graph; only constants are kept."""
        if not torch.is_grad_enabled():
            return
        number = torch._C._current_graph_task_id()
        if number != self._pass:
            self._pass, self._weights = number, {}
        is_known = not (weight.requires_grad or is_functorch_wrapped_tensor(weight))
        self._weights[source] = weight if is_known else None

    def _arrived_(self, key: int | str, derivative: Tensor) -> None:
        """Find a derivative, if all vectors that it was taken with are known constants."""
        is_new = torch._C._current_graph_task_id() == self._pass and derivative.requires_grad
        if not (torch.is_grad_enabled() and is_new):
            return
        weights = {source: own for source, own in self._weights.items() if own is not None}
        if len(weights) < len(self._weights):
            return
        found, owners = self._found(), [owner() for owner in self._owners]
        if found is not None and None not in owners:
            source = Derivative(key, tuple(weights.items()))
            found(*owners, source, derivative)
            self.watch_(source, derivative)


def takes_derivatives(value: Any) -> bool:
    """Return whether derivatives of a call by an argument may be taken."""
    if type(value) is not Tensor or not (value.requires_grad and torch.is_grad_enabled()):
        return False
    return value.layout is torch.strided and not is_functorch_wrapped_tensor(value)
