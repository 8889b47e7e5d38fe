"""Levenberg-Marquardt damping, which follows the reduction ratio."""

from __future__ import annotations

from typing import Any

from einconv_kfac.optim.state_schema import NUMBER, Maybe, Record

INITIAL_FRACTION = 0.1
"""First damping, as a fraction of the curvature along the first gradient."""
FLOOR_FRACTION = 1e-1
"""Smallest damping, as a fraction of the first: on its own batch the loss falls as predicted even
for a step that fits noise."""
ADAPTATION_PERIOD = 10
"""Steps between two adaptations of the damping."""
ADAPTATION = (19 / 20) ** 5
"""Factor of one adaptation (Martens and Grosse, 2015)."""


class LevenbergMarquardt:
    """Shrinks the damping where the quadratic model predicts well, and grows it elsewhere.

    The damping shrinks where the ratio of the true to the predicted reduction is above 3/4, and
    grows where it is below 1/4 (Martens and Grosse, 2015), or above 1 for a
    predicted growth. It stays above a floor, which rises with every rejected step.
    """

    def __init__(self) -> None:
        self._damping: float | None = None
        self._floor = 0.0

    def damping(self, step: int) -> float | None:
        """See `DampingRule`."""
        return self._damping

    @property
    def floor(self) -> float:
        """The smallest damping."""
        return self._floor

    def initial(self, curvature: float) -> None:
        """See `DampingRule`."""
        self._damping = INITIAL_FRACTION * curvature
        self._floor = FLOOR_FRACTION * self._damping

    def after_ratio(self, ratio: float, predicted: float) -> None:
        """See `DampingRule`.

        A growth may be predicted where ``lr`` or the momentum is given. It is no reason to
        shrink the damping, and a reason to grow it where the true growth is larger.
        """
        if self._damping is None:
            return
        if predicted < 0 and ratio > 3 / 4:
            self._damping = max(self._damping * ADAPTATION, self._floor)
        elif not 1 / 4 <= ratio <= 1:  # also if it is not a number
            self._damping /= ADAPTATION

    def after_rejection(self, factor: float) -> None:
        """See `DampingRule`."""
        if self._damping is not None:
            self._damping *= factor
            self._floor *= factor

    def state_dict(self) -> dict[str, Any]:
        """See `DampingRule`."""
        return {"damping": self._damping, "floor": self._floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DampingRule`.

        Raises:
            ValueError: If it is no state of this rule. Nothing is changed then.
        """
        Record({"damping": Maybe(NUMBER), "floor": NUMBER}).check("'rule'", state)
        self._damping, self._floor = state["damping"], state["floor"]
