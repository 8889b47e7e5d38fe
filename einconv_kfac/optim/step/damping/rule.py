"""What a damping rule is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DampingRule(Protocol):
    """Sets the damping of the quadratic model from what the steps did.

    A rule is given as ``KFAC(..., damping=rule)``. It is asked for the damping of each step, and
    is told how the steps went.
    """

    def damping(self, step: int) -> float | None:
        """Return the damping of a step, or ``None`` before `initial` was called.

        Args:
            step: The number of steps taken.
        """

    def initial(self, curvature: float) -> None:
        """Set the first damping.

        Args:
            curvature: ``g.(G + W).g / g.g``, the curvature along the first gradient ``g`` that
                is not zero; at least ``g.g / (2 f)`` for the objective ``f`` where the model
                promises a reduction of many times ``f``. Positive.
        """

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None:
        """Adapt the damping to a reduction ratio, about every tenth step and where it is below 1/4.

        It is not called where the predicted change is within the rounding of the objective.

        Args:
            ratio: The true by the predicted change of the objective; may be not finite.
            predicted: The change that the quadratic model predicted, negative for a reduction.
            noise: The difference of two batches' objectives at one point, relative to what the
                step between them reduces, from 0, where the batch repeats, to 1. The ratio is
                that on the step's own batch, which does not show whether the step fits noise.
        """

    def after_rejection(self, factor: float) -> None:
        """Raise the damping after a step that was undone or shortened.

        Args:
            factor: Factor above 1 by which to raise it: larger for a step that was undone.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
