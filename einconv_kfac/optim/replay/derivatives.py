"""Derivatives of a call of a model by its inputs, evaluated again.

The inputs are arguments of the call, and vectors of earlier derivatives. A vector may itself depend
on the call. What comes back through it is no part of the derivative: it belongs to operations of
the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from einconv_kfac.optim.replay.loss_input import Derivative, Direct, LossInput, Vector
from einconv_kfac.optim.replay.subsample import Subset

Context: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Returns the context of a run."""


class Gate:
    """Ends backward passes at tensors while it is closed."""

    def __init__(self) -> None:
        self._is_closed = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close the gate inside the block."""
        before, self._is_closed = self._is_closed, True
        try:
            yield
        finally:
            self._is_closed = before

    def behind(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose gradients reach another one only through the open gate."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        view = tensor.view_as(tensor)
        assert view.grad_fn is not None
        view.grad_fn.register_prehook(self._passed)
        return view

    def _passed(self, gradients: tuple[Any, ...]) -> Any:
        """Return no gradients if the gate is closed; ``None`` leaves them as they are."""
        return (None,) * len(gradients) if self._is_closed else None


class Derivatives:
    """The derivatives of one run of a model.

    Args:
        args: The positional arguments of the run.
        kwargs: Its keyword arguments.
        wanted: The derivatives, with all that they are taken of.
        dependent: Returns the value of a vector that depends on parameters, ``None`` for constants.
        gate: The gate of all runs.
        subset: The examples that the run is restricted to, if not all.

    Attributes:
        args: The positional arguments, of which those that are differentiated by are new tensors.
        kwargs: The keyword arguments likewise.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: Sequence[Derivative],
        dependent: Callable[[Vector], Tensor | None],
        gate: Gate,
        subset: Subset | None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self._dependent, self._gate, self._subset = dependent, gate, subset
        self._inputs: dict[int | Vector, Tensor] = {}
        self._targets = {each.by for each in wanted}
        if any(isinstance(by, int) for by in self._targets):
            leaves, spec = tree_flatten((args, kwargs))
            for by in self._targets:
                if isinstance(by, int):
                    self._inputs[by] = leaves[by] = _input(leaves[by])
            self.args, self.kwargs = tree_unflatten(leaves, spec)
        self._known: dict[LossInput, Tensor] = {}

    def begin_(self, returned: Mapping[Direct, Tensor]) -> None:
        """Receive the tensors of the run itself."""
        self._known |= dict[LossInput, Tensor](returned.items())

    def value(
        self, source: LossInput, context: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """Return a tensor of the call.

        Args:
            source: The tensor.
            context: Returns the context of the run.
        """
        if source not in self._known:
            assert isinstance(source, Derivative)
            ends = [self.value(each, context) for each, _ in source.weights]
            vectors = [self._vector(vector) for _, vector in source.weights]
            by = source.by if isinstance(source.by, int) else self._vector(source.by)
            given = self._inputs[by] if isinstance(by, int) else by
            pairs = [(e, v) for e, v in zip(ends, vectors) if e.requires_grad]
            known, own = zip(*(pairs or zip(ends, vectors)))
            with context(), self._gate.closed():
                (found,) = torch.autograd.grad(known, given, own, create_graph=True)
            self._known[source] = found
        return self._known[source]

    def _vector(self, vector: Vector) -> Tensor:
        """Return the value of a vector."""
        if vector not in self._inputs:
            value = self._dependent(vector)
            if value is None:
                value = vector.value if self._subset is None else vector.value[self._subset.rows]
            else:
                value = self._gate.behind(value.to(vector.value.dtype))
            self._inputs[vector] = _input(value) if vector in self._targets else value
        return self._inputs[vector]


def _input(value: Tensor) -> Tensor:
    """Return a tensor, with its tangent and its graph, by which derivatives are taken."""
    if value.requires_grad and torch.is_grad_enabled():
        return value.view_as(value)
    with torch.no_grad():
        return value.view_as(value).requires_grad_()
