"""Learning rates that are meant for another optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

SMALL_RATE = 0.01
"""Learning rate below which an automatic step changes hardly anything."""
FIRST_STEPS = range(9, 100)
"""Steps in which a small rate is reported: a warm-up is over, and a decay has not begun."""
TOO_SMALL = (
    "The learning rate was {rate:.1e} at most so far. With adaptive=True it multiplies a step that "
    "has a length of its own, so that the parameters hardly move. Leave out `lr`, which is then 1; "
    "where the script assigns rates or a scheduler multiplies them, divide them by the largest "
    "one. Rates as those of SGD need adaptive=False."
)


class SmallRates:
    """Reports once that the learning rates of an automatic step are those of another optimizer.

    Scripts set ``param_group["lr"]``, or schedulers do, to rates that Adam would need.
    """

    def __init__(self) -> None:
        self._largest, self._warned = 0.0, False

    def look_(self, rates: Mapping[str, float], step: int) -> None:
        """Look at the rates of a step.

        Args:
            rates: The learning rates by parameter.
            step: The number of steps before.
        """
        self._largest = max(self._largest, *rates.values())
        if self._largest < SMALL_RATE and step in FIRST_STEPS and not self._warned:
            self._warned = True
            warnings.warn(TOO_SMALL.format(rate=self._largest), UserWarning, stacklevel=9)
