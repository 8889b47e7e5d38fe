"""Undoing the last step where the objective has exploded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from einconv_kfac.optim.state_schema import FINITE, Listed, Maybe, Record

MOMENTUM_BUFFER = "momentum_buffer"
"""The last update of a parameter, in the optimizer's state."""


class Rollback:
    """Undoes the last step if the objective on the next batch exploded.

    That is: if it exceeds all values so far by more than their largest size or range. On the
    batch of the last step itself, a step that fits noise looks as good as any.

    Attributes:
        value: The last value that did not explode; not a number before the first.
    """

    def __init__(self) -> None:
        self._range: tuple[float, float] | None = None
        self.value = math.nan

    @property
    def lowest(self) -> float:
        """The lowest value that did not explode; not a number before the first."""
        return self._range[0] if self._range else math.nan

    def is_needed(self, value: float) -> bool:
        """Return whether a value of the objective has exploded."""
        lowest, highest = self._range or (value, value)
        return value > highest + max(abs(highest), highest - lowest)

    def accept_(self, value: float) -> None:
        """Extend the range of values that did not explode."""
        lowest, highest = self._range or (value, value)
        self._range = min(lowest, value), max(highest, value)
        self.value = value

    schema = Record({"range": Maybe(Listed(FINITE, 2))})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        return {"range": self._range and list(self._range)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._range = state["range"] and (state["range"][0], state["range"][1])


def last_update(memory: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return the last update, by parameter name."""
    return {n: state[MOMENTUM_BUFFER] for n, state in memory.items() if MOMENTUM_BUFFER in state}


def undo_(parameters: Mapping[str, Tensor], memory: Mapping[str, dict[str, Any]]) -> None:
    """Take the last update back."""
    for name, parameter in parameters.items():
        if MOMENTUM_BUFFER in memory[name]:
            parameter.sub_(memory[name].pop(MOMENTUM_BUFFER))
