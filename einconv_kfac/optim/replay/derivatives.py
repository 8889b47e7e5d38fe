"""Derivatives of a call of a model by its arguments, evaluated again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.replay.loss_input import Derivative, Direct, LossInput
from einconv_kfac.optim.replay.subsample import Subset


class Derivatives:
    """The derivatives of one run of a model.

    Args:
        args: The positional arguments of the run.
        kwargs: Its keyword arguments.
        wanted: Tensors of the call, some of them derivatives.
        subset: The examples that the run is restricted to, if not all.

    Attributes:
        args: The positional arguments, of which those that are differentiated by are new leaves.
        kwargs: The keyword arguments likewise.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        wanted: Iterable[LossInput],
        subset: Subset | None,
    ) -> None:
        self._leaves: dict[int | str, Tensor] = {}
        self._subset = subset
        for each in wanted:
            self._add_(each, args, kwargs)
        self.args = tuple(self._leaves.get(i, own) for i, own in enumerate(args))
        self.kwargs = {name: self._leaves.get(name, own) for name, own in kwargs.items()}

    def _add_(self, source: LossInput, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Make leaves of the arguments of a derivative, and of those that it is taken of."""
        if not isinstance(source, Derivative):
            return
        key = source.argument
        if key not in self._leaves:
            own: Tensor = args[key] if isinstance(key, int) else kwargs[key]
            self._leaves[key] = own.detach().requires_grad_()
        for before, _ in source.weights:
            self._add_(before, args, kwargs)

    def found(
        self, wanted: Sequence[LossInput], returned: Mapping[Direct, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the tensors of the call.

        Args:
            wanted: The tensors.
            returned: Those that are no derivatives, and those that derivatives are taken of.
        """
        known = dict[LossInput, Tensor](returned.items())
        return tuple(self._value(each, known) for each in wanted)

    def _value(self, source: LossInput, known: dict[LossInput, Tensor]) -> Tensor:
        """Return a tensor of the call, and note it among those that are known."""
        if source not in known:
            assert isinstance(source, Derivative)
            ends = [self._value(each, known) for each, _ in source.weights]
            rows = slice(None) if self._subset is None else self._subset.rows
            vectors = [vector[rows] for _, vector in source.weights]
            leaf = self._leaves[source.argument]
            (known[source],) = torch.autograd.grad(ends, leaf, vectors, create_graph=True)
        return known[source]


def without_derivatives(wanted: Sequence[LossInput]) -> tuple[Direct, ...]:
    """Return the tensors of a call that are wanted, or that derivatives are taken of."""
    found: dict[Direct, None] = {}
    waiting = [*wanted]
    while waiting:
        source = waiting.pop(0)
        if isinstance(source, Derivative):
            waiting += [each for each, _ in source.weights]
        else:
            found[source] = None
    return tuple(found)
