"""Whether batches agree on the objective, or repeat."""

from __future__ import annotations

import math
from typing import Any

from einconv_kfac.optim.schedule import is_due
from einconv_kfac.optim.state_schema import COUNT, NOT_NEGATIVE, NUMBER, Listed, Maybe, Record
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.step.rounding import ROUNDING_MARGIN

LARGEST_NOISE = 0.1
"""Noise from which on batches disagree: the floor of the damping counts in full, and the damping
shrinks no faster."""
DISAGREEMENT_PERIOD = 100
"""Steps between two comparisons of batches that have disagreed, so that the floor counts in full.
Where they have agreed, they are compared whenever the predicted change is, with the true one."""
EARLY_DISAGREEMENT_SHARE = 2
"""Early in training, a comparison is due each time the number of steps has about doubled."""


class Agreement:
    """The difference of two batches' objectives at one point, relative to what a step reduces.

    The objective of a batch is ``f``, that of the next batch ``f'``. A step on the batch leads from
    ``w`` to ``v``. Then ``|f'(v) - f(v)| / |f(w) - f(v)|`` is 0 where the batch repeats, however
    far the objective is from quadratic. The trust in slopes falls for both reasons, and does not
    separate them. The next step evaluates ``f'(v)``; ``f(v)`` takes one forward pass.

    Attributes:
        noise: The last such number, at most 1; 1 before the first.
    """

    def __init__(self) -> None:
        self.noise = 1.0
        self._compared: int | None = None
        self._expected: tuple[float, float, float] | None = None
        self._unread: Unread | None = None

    @property
    def is_close(self) -> bool:
        """Whether batches agree, or repeat, so that the floor of the damping falls."""
        return self.noise < LARGEST_NOISE

    def is_due(self, step: int) -> bool:
        """Return whether to compare the batch of a step, which is compared with its prediction."""
        if self.is_close:
            return True
        return is_due(step, self._compared, DISAGREEMENT_PERIOD, EARLY_DISAGREEMENT_SHARE)

    def expect_(self, before: float, after: float, rounding: float, step: int) -> None:
        """Keep the objective of a batch, for the next batch to be compared with.

        Args:
            before: The objective before the step.
            after: The objective after the step, on the same batch.
            rounding: The rounding error of the objective.
            step: The number of steps taken before.
        """
        self._expected, self._compared, self._unread = (before, after, rounding), step, None

    def expect_later_(self, numbers: Unread, step: int) -> None:
        """Keep the numbers of `expect_`, which the host reads when they are needed.

        Args:
            numbers: The objective before and after the step, and its rounding error.
            step: The number of steps taken before.
        """
        self._expected, self._compared, self._unread = None, step, numbers

    def _read_(self) -> tuple[float, float, float] | None:
        """Return the numbers that are kept."""
        if self._unread is not None:
            (before,), (after,), (rounding,) = self._unread.read()
            self._expected, self._unread = (before, after, rounding), None
        return self._expected

    def sample_(self, value: float) -> None:
        """Compare the objective of the next batch, if one is kept.

        A difference within rounding is none.
        """
        if (expected := self._read_()) is None:
            return
        before, after, rounding = expected
        difference, reduction = abs(value - after), abs(before - after)
        if difference <= ROUNDING_MARGIN * rounding:
            self.noise = 0.0
        else:  # also if a value is not finite
            noise = difference / reduction if reduction else math.inf
            self.noise = noise if noise < 1 else 1.0
        self.drop_()

    def drop_(self) -> None:
        """Drop the objective that is kept."""
        self._expected = self._unread = None

    schema = Record(
        {"noise": NOT_NEGATIVE, "compared": Maybe(COUNT), "expected": Maybe(Listed(NUMBER, 3))}
    )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        expected = self._read_()
        kept = expected and list(expected)
        return {"noise": self.noise, "compared": self._compared, "expected": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.noise, self._compared = state["noise"], state["compared"]
        kept, self._unread = state["expected"], None
        self._expected = kept and (kept[0], kept[1], kept[2])
