"""A step that is taken before the host has read whether its numbers are finite.

On a GPU the host would wait for the backward pass in each step. An ordinary step with fixed rates
has nothing to decide but that. There the device itself leaves parameters and momentum as they are
where a number is not finite, and the host reads the flag when it is next asked for something: in
the next step at the latest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from einconv_kfac.curvature.devices.late_numbers import LateNumbers
from einconv_kfac.optim.factors.finiteness import NOT_FINITE, Finiteness
from einconv_kfac.optim.step.objective import Memory
from einconv_kfac.optim.step.selection import or_others


class LateCheck:
    """The check of the last step, if it is still to come.

    Attributes:
        is_settled: Whether there is nothing to check.
    """

    def __init__(self) -> None:
        self._undo: tuple[Callable[[], None], ...] = ()
        self._waiting: tuple[LateNumbers, list[str]] | None = None
        self.is_settled = True

    def prepare_(self, *undo: Callable[[], None]) -> None:
        """Take functions that restore, after the coming step, what the device does not."""
        self._undo = undo

    def begin_(self, finite: Finiteness) -> None:
        """Leave the check of the step for later.

        Args:
            finite: Whether its numbers are finite, by whose flag the device decides.
        """
        self._waiting = LateNumbers(finite.numbers), finite.names()
        self.is_settled = False

    def drop_(self) -> None:
        """Drop the check of a step that was not taken."""
        self._waiting, self.is_settled = None, True

    def settle_(self) -> bool:
        """Check the last step if that is still to be done; return ``False`` if it was skipped."""
        if self._waiting is None:
            return True
        numbers, names = self._waiting
        self.drop_()
        found = zip(names, numbers.read())
        fault = next((name for name, number in found if not math.isfinite(number)), None)
        if fault is None:
            return True
        for restore in self._undo:
            restore()
        warnings.warn(NOT_FINITE.format(fault), RuntimeWarning, stacklevel=4)
        return False


def restore_memory_(memory: Memory, before: Memory, finite: Finiteness) -> Callable[[], None]:
    """Have the device restore tensors of the optimizer's state if a number is not finite.

    Args:
        memory: The state, by parameter name; its tensors are replaced.
        before: The state before the step.
        finite: Whether all numbers are finite, as the device knows.

    Returns:
        A function that restores everything but the tensors that were there before.
    """
    tensors = {
        (name, key): (value, old)
        for name, own in memory.items()
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(old := before[name].get(key), Tensor)
        if value is not old
    }
    others: list[tuple[str, dict[str, Any]]] = [
        (name, {key: value for key, value in own.items() if not isinstance(value, Tensor)})
        for name, own in before.items()
    ]
    if tensors:
        new, old = (list(own) for own in zip(*tensors.values()))
        for (name, key), value in zip(tensors, or_others(new, old, finite)):
            memory[name][key] = value
    known = {name: set(own) for name, own in before.items()}

    def undo_() -> None:
        for name, own in others:
            for key in memory[name].keys() - known[name]:
                del memory[name][key]
            memory[name].update(own)

    return undo_
