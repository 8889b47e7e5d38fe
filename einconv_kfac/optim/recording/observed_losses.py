"""Marks of losses in the graph, and numbers that a model returned, each of which may be a loss."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import (
    Edge,
    backpropagated,
    dependents,
    edge_of,
    first_met,
    mark_of,
)

ROUNDING = 1e3
"""Rounding errors up to which the weight that is left of a loss counts as none."""
INDEPENDENT = (
    "`loss` must depend on what the model returned or on its parameters, got a loss that does not. "
    "Call `observe` of the optimizer whose model it trains, before `loss.backward()`."
)
"""Why a loss cannot be observed."""


@dataclass(eq=False)
class ObservedLoss:
    """Marks a loss that is recorded when it is backpropagated.

    Args:
        is_replaced: Whether a loss of which it is a part is recorded in its place.
    """

    is_replaced: bool = False
    _pass: int = -1
    _passed: Tensor | None = None

    def pass_(self, weight: Tensor) -> None:
        """Note the part of its weight that recorded losses have in the pass that is running.

        Args:
            weight: The derivative of these losses by this one, times their own weights.
        """
        number = torch._C._current_graph_task_id()
        known = self._passed if self._pass == number else None
        self._pass, self._passed = number, weight if known is None else known + weight

    def rest_(self, weight: Tensor) -> Tensor | None:
        """Return the part of its weight that no recorded loss has, or ``None`` if that is none.

        Args:
            weight: The weight in the pass that is running.
        """
        passed = self._passed if self._pass == torch._C._current_graph_task_id() else None
        self._passed = None
        if passed is None:
            return weight
        rest = weight - passed.to(weight.dtype).reshape(weight.shape)
        bound = ROUNDING * torch.finfo(weight.dtype).eps * weight.abs().maximum(passed.abs())
        return None if bool((rest.abs() <= bound).all()) else rest


class ReturnedLosses:
    """The numbers that a model returned since the last step, each of which may be a loss.

    Such a number is a loss if the backward pass comes through it and it is not a part of another
    loss. A number that other tensors of the output depend on is none.

    Attributes:
        is_needed: Whether they count, as no loss of the module that was given was computed.
        marks: Their marks.
    """

    def __init__(self) -> None:
        self.is_needed = True
        self.marks: list[weakref.ref[ObservedLoss]] = []

    def add_(self, mark: ObservedLoss) -> None:
        """Add the mark of a number."""
        self.marks = [each for each in self.marks if each() is not None]
        self.marks.append(weakref.ref(mark))

    def pass_on_(self, root: Edge | None, weight: Tensor, owner: object) -> None:
        """Note what the weight of a recorded loss contributes to those of numbers below it.

        Args:
            root: The edge of the loss; ``None`` if it has no such parts.
            weight: Its whole weight, of which all that leads to it is recorded.
            owner: The owner of the marks.
        """
        known = {mark for each in self.marks if (mark := each()) is not None}
        if root is None or not known - {mark_of(root, owner)}:
            return

        def stops(edge: Edge) -> bool:
            return edge != root and mark_of(edge, owner) in known

        nodes = dependents(root, stops)
        with torch.no_grad():
            found = backpropagated({root: weight}, nodes, stops)
        for edge, own in found.items():
            mark_of(edge, owner).pass_(own)


def ends_among(numbers: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Return the numbers that no other tensor of the output depends on.

    Args:
        numbers: Numbers that a model returned.
        others: The other tensors that it returned.
    """
    edges = {edge_of(number): number for number in numbers}
    first = min((edge[0]._sequence_nr() for edge in edges), default=0)
    later = [t for t in others if t.grad_fn is not None and t.grad_fn._sequence_nr() > first]
    used = first_met(map(edge_of, later), edges.__contains__)
    return [number for edge, number in edges.items() if edge not in used]


def check_number(loss: object) -> None:
    """Raise a ``ValueError`` if a loss is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"`loss` must be a tensor with one number, got {given}.")
