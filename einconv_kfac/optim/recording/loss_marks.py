"""Marks of losses in a graph, and of the calls of loss modules that they result from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.objective.graph import Edge, edge_of, has_marks, mark_, mark_of, within
from einconv_kfac.curvature.objective.loss_calls import LossCall
from einconv_kfac.curvature.objective.outputs import numbers_of, tensors_of
from einconv_kfac.optim.recording.observed_losses import ObservedLoss, ReturnedLosses, ends_among


class LossMarks:
    """The losses that were observed or computed, and the calls of loss modules.

    Attributes:
        returned: The numbers that the model returned, each of which may be a loss.
    """

    def __init__(self) -> None:
        self.returned = ReturnedLosses()

    @property
    def _observed(self) -> tuple[int, str]:
        """The owner of the marks of losses."""
        return id(self), "loss"

    @property
    def _called(self) -> tuple[int, str]:
        """The owner of the marks of calls."""
        return id(self), "call"

    def mark_(self, loss: Tensor) -> ObservedLoss:
        """Mark a loss, and return the mark."""
        mark = ObservedLoss()
        mark_(loss, self._observed, mark)
        return mark

    def at(self, edge: Edge) -> ObservedLoss | None:
        """Return the mark of a loss at an edge of the graph."""
        if not has_marks(edge):
            return None
        found: ObservedLoss | None = mark_of(within(edge), self._observed)
        return mark_of(edge, self._observed) if found is None else found

    def mark_call_(self, loss_fn: nn.Module, arguments: Sequence[Any], loss: Tensor) -> None:
        """Mark a loss as the result of a call of a loss module."""
        call = LossCall.of(loss_fn, arguments, loss)
        if call is not None:
            mark_(loss, self._called, call)

    def call_at(self, edge: Edge) -> LossCall | None:
        """Return the call of a loss module whose result is at an edge of the graph."""
        found: LossCall | None = mark_of(edge, self._called)
        return found

    def new_numbers(self, output: Any) -> list[Tensor]:
        """Return the numbers in an output that may be losses, and are not observed yet."""
        numbers = numbers_of(output)
        if not numbers:
            return []
        known = {id(number) for number in numbers}
        others = [tensor for tensor in tensors_of(output) if id(tensor) not in known]
        found = ends_among(numbers, others)
        return [number for number in found if self.at(edge_of(number)) is None]

    def pass_on_(self, root: Edge | None, weight: Tensor) -> None:
        """Note what a loss that is recorded contributes to numbers that the model returned.

        Args:
            root: The edge of the loss; ``None`` if it has no such parts.
            weight: Its whole weight in the pass that is running.
        """
        if self.returned.marks:
            self.returned.pass_on_(root, weight, self._observed)
