"""Hyper-parameters, validated, and when periodic work is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

Schedule: TypeAlias = float | Callable[[int], float]
"""A number, or a function of the number of steps taken so far."""


@dataclass(frozen=True)
class GroupSettings:
    """Hyper-parameters that each parameter group may set; ``None`` stands for the optimizer's.

    `KFAC` explains them. A layer whose bias is in another group takes its weight's settings,
    but each parameter takes its own ``lr``, ``weight_decay`` and ``momentum``.

    Raises:
        ValueError: If a number is out of range.
    """

    lr: float
    weight_decay: float = 0.0
    momentum: float | None = None
    damping: float | None = None
    factor_decay: float | None = None
    factor_update_period: int | None = None
    inverse_update_period: int | None = None

    def __post_init__(self) -> None:
        in_range("lr", self.lr)
        in_range("weight_decay", self.weight_decay)
        if self.damping is not None:
            in_range("damping", self.damping, positive=True)
        for name in ("factor_decay", "momentum"):
            if (value := getattr(self, name)) is not None:
                in_range(name, value, below=1.0)
        for name in ("factor_update_period", "inverse_update_period"):
            if (value := getattr(self, name)) is not None:
                positive_integer(name, value)

    @staticmethod
    def of(group: dict[str, Any]) -> GroupSettings:
        """Return the settings of a parameter group, checked again."""
        return GroupSettings(**{entry.name: group[entry.name] for entry in fields(GroupSettings)})


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the whole optimizer, each of which may be a function of the step.

    `KFAC` explains them.

    Raises:
        ValueError: If a number is out of range.
    """

    damping: Schedule | None = None
    factor_decay: Schedule = 0.95
    factor_update_period: Schedule = 10
    inverse_update_period: Schedule = 100
    momentum: Schedule | None = None
    kl_clip: Schedule | None = 1e-3
    max_step_norm: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("damping", "kl_clip", "max_step_norm"):
            self._check(name, positive=True)
        for name in ("factor_decay", "momentum"):
            self._check(name, below=1.0)
        for name in ("factor_update_period", "inverse_update_period"):
            if not callable(value := getattr(self, name)):
                positive_integer(name, value)

    def _check(self, name: str, **bounds: Any) -> None:
        value = getattr(self, name)
        if value is not None and not callable(value):
            in_range(name, value, **bounds)

    def at(self, step: int) -> Constants:
        """Return the numbers for a step, checked again."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        numbers = {name: value(step) for name, value in values.items() if callable(value)}
        current = replace(self, **numbers)
        return Constants(**{entry.name: getattr(current, entry.name) for entry in fields(self)})


@dataclass(frozen=True)
class Constants:
    """The numbers of `Settings` at one step."""

    damping: float | None
    factor_decay: float
    factor_update_period: int
    inverse_update_period: int
    momentum: float | None
    kl_clip: float | None
    max_step_norm: float | None

    def of(self, group: GroupSettings | None) -> Constants:
        """Return the numbers that hold for a parameter group."""
        if group is None:
            return self
        names = {entry.name for entry in fields(self)} & {entry.name for entry in fields(group)}
        own = {name: getattr(group, name) for name in names}
        return replace(self, **{name: value for name, value in own.items() if value is not None})


def positive_integer(name: str, value: Any) -> int:
    """Return a positive integer.

    Raises:
        ValueError: If it is not one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return value


def fraction(name: str, value: Any) -> float:
    """Return a number in ``(0, 1]``.

    Raises:
        ValueError: If it is not one.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}.")
    return float(value)


def in_range(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> float:
    """Return a number in ``[0, below)``, or in ``(0, below)``.

    Raises:
        ValueError: If it is not one.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < below or (positive and value == 0):
        rule = f"in {'(' if positive else '['}0, {below})"
        raise ValueError(f"`{name}` must be a number {rule}, got {value!r}.")
    return float(value)


def is_due(step: int, last: int | None, period: int, growth: int = 10) -> bool:
    """Tell whether work is due that is done every ``period`` steps, and more often early.

    It is due when a ``growth``-th of all steps were taken since the last time, at the latest
    ``period`` steps after it.
    """
    return last is None or step - last >= interval(step, period, growth)


def interval(step: int, period: int, growth: int = 10) -> int:
    """Return after how many steps such work is due."""
    return min(period, max(1, step // growth))


def checked_safeguard(value: bool, adaptive: bool, damping: object) -> bool:
    """Return whether every step is checked.

    Raises:
        ValueError: If it is to be and the damping does not follow from such checks.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`safeguard` must be True or False, got {value!r}.")
    if value and not (adaptive and damping is None):
        raise ValueError(
            "`safeguard` must be False where adaptive=False or a `damping` is given, got "
            "True: what is checked reacts by its damping. Leave `damping` out, and pass "
            "adaptive=True."
        )
    return value
