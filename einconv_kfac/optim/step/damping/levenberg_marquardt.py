"""Levenberg-Marquardt damping, which follows the reduction ratio."""

from __future__ import annotations

from typing import Any

import torch

from einconv_kfac.optim.state_schema import NOT_NEGATIVE, POSITIVE, Maybe, Record
from einconv_kfac.optim.step.agreement import LARGEST_NOISE

INITIAL_FRACTION = 0.1
"""First damping, as a fraction of the curvature along the first gradient."""
FLOOR_FRACTION = 2e-2
"""Smallest damping where batches differ, as a fraction of the first: on its own batch the loss
falls as predicted even for a step that fits noise."""
ADAPTATION_PERIOD = 10
"""Steps between two adaptations of the damping."""
ADAPTATION = (19 / 20) ** 5
"""Factor of one adaptation (Martens and Grosse, 2015)."""
SMALLEST_SHARE = 8 * torch.finfo(torch.float32).eps
"""Smallest fraction of the floor that counts: below it, the damping would be within the rounding of
the curvature in single precision, and so would be the step."""
LARGEST_DAMPING = 1e30
"""Damping up to which rejections raise it: inverses in single precision are finite."""
UNUSED_POWER = 4
"""Power of that factor where the reduction is twice the predicted one, as for a damping that is
much larger than the curvature and not needed at all."""


class LevenbergMarquardt:
    """Shrinks the damping where the quadratic model predicts well, and grows it elsewhere.

    The damping shrinks where the ratio of the true to the predicted reduction is above 3/4, and
    grows where it is below 1/4 (Martens and Grosse, 2015), or above 1 for a
    predicted growth. It stays above a floor, which a rejected step and a ratio below 1/4 raise,
    though not beyond the damping: the first damping, of which the floor is a fraction, is that of
    one batch, and may be too small for the others.

    Where batches hardly differ, the floor falls in proportion to the noise, down to rounding where
    the batch repeats. There the damping also shrinks faster, the more the ratio exceeds 1:
    the damping has a share in the predicted change, and the ratio is 1 plus that share if nothing
    but the curvature of the model opposes the step. With noise neither would be safe, since the
    ratio is that on the step's own batch. A damping below a floor that has risen grows towards it.
    """

    def __init__(self) -> None:
        self._damping: float | None = None
        self._floor = 0.0

    def damping(self, step: int) -> float | None:
        """See `DampingRule`."""
        return self._damping

    @property
    def floor(self) -> float:
        """The smallest damping where batches differ."""
        return self._floor

    def initial(self, curvature: float) -> None:
        """See `DampingRule`."""
        self._damping = INITIAL_FRACTION * curvature
        self._floor = FLOOR_FRACTION * self._damping

    def after_ratio(self, ratio: float, predicted: float, noise: float) -> None:
        """See `DampingRule`.

        A growth may be predicted where ``lr`` or the momentum is given. It is no reason to
        shrink the damping, and a reason to grow it where the true growth is larger.
        """
        if self._damping is None:
            return
        if predicted < 0 and ratio > 3 / 4:
            relative = min(max(noise / LARGEST_NOISE, SMALLEST_SHARE), 1.0)
            self._damping = self._shrunk(self._damping, ratio, relative)
        elif not 1 / 4 <= ratio <= 1:  # also if it is not a number
            self._damping /= ADAPTATION
            if predicted < 0 and not ratio > 1:
                self._raise_floor_(1 / ADAPTATION)

    def _shrunk(self, damping: float, ratio: float, noise: float) -> float:
        """Return a damping after a ratio above 3/4: closer to the floor, or at it.

        Args:
            damping: The damping before.
            ratio: The ratio.
            noise: The noise as a fraction of `LARGEST_NOISE`, at most 1.
        """
        floor = self._floor * noise
        if damping <= floor:
            return min(damping / ADAPTATION, floor)
        unused = min(max(ratio - 1, 0.0), 1.0) * (1 - noise)
        power: float = ADAPTATION ** (1 + (UNUSED_POWER - 1) * unused)
        return max(damping * power, floor)

    def after_rejection(self, factor: float) -> None:
        """See `DampingRule`."""
        if self._damping is not None:
            self._damping = min(self._damping * factor, max(self._damping, LARGEST_DAMPING))
            self._raise_floor_(factor)

    def _raise_floor_(self, factor: float) -> None:
        """Raise the floor by a factor, though not beyond the damping."""
        if self._damping is not None:
            self._floor = max(self._floor, min(self._floor * factor, self._damping))

    def state_dict(self) -> dict[str, Any]:
        """See `DampingRule`."""
        return {"damping": self._damping, "floor": self._floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DampingRule`.

        Raises:
            ValueError: If it is no state of this rule. Nothing is changed then.
        """
        Record({"damping": Maybe(POSITIVE), "floor": NOT_NEGATIVE}).check("'rule'", state)
        self._damping, self._floor = state["damping"], state["floor"]
