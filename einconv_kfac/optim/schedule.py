"""When periodic work is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Schedule: TypeAlias = float | Callable[[int], float]
"""A number, or a function of the number of steps taken so far."""

EARLY_SHARE = 10
"""Early in training, periods are capped at this fraction (one tenth) of the steps taken."""

FIRST_SHARE = 2
"""The fraction of the steps taken (a half) that caps the least period of costly work."""


def is_due(
    step: int, last: int | None, period: int, share: float = EARLY_SHARE, least: int = 1
) -> bool:
    """Return whether periodic work is due; it always is the first time.

    Args:
        step: The number of steps taken.
        last: The step at which the work was done last, or ``None``.
        period: Steps between two times.
        share: Early in training the period is capped at ``step / share``, rounded down.
        least: The smallest number of steps between two times, once twice as many were taken.
    """
    return last is None or step - last >= interval(step, period, share, least)


def interval(step: int, period: int, share: float = EARLY_SHARE, least: int = 1) -> int:
    """Return the number of steps between two times, see `is_due`."""
    return min(period, max(1, int(step / share), min(least, step // FIRST_SHARE)))


def due_names(step: int, work: Mapping[str, tuple[int | None, int]]) -> list[str]:
    """Return the names whose work is due, from the last step and the period of each."""
    return [name for name, (last, period) in work.items() if is_due(step, last, period)]


def intervals(step: int, periods: Mapping[str, int], least: int = 1) -> dict[str, int]:
    """Return the number of steps between two times by name, see `interval`."""
    return {name: interval(step, period, least=least) for name, period in periods.items()}


def value_at(name: str, schedule: Callable[[int], Any], step: int) -> Any:
    """Return the value of a function of the step.

    Args:
        name: The argument that the function was given as.
        schedule: The function.
        step: The number of steps taken.

    Raises:
        ValueError: If the function fails, or returns no value.
    """
    try:
        value = schedule(step)
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a number or a function of the number of steps, got {schedule!r}, "
            f"which failed at {step}: {type(error).__name__}: {error}."
        ) from error
    if value is None:
        raise ValueError(
            f"`{name}` must be a function that returns a number, got None from {schedule!r} at "
            f"step {step}."
        )
    return value
