"""Hyper-parameters, validated, and when periodic work is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

Schedule: TypeAlias = float | Callable[[int], float]


@dataclass(frozen=True)
class GroupSettings:
    """Hyper-parameters that each parameter group may set.

    Args:
        lr: Scale of the update.
        weight_decay: Coefficient of half the squared norm that is added to the objective.

    Raises:
        ValueError: If a number is out of range.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        in_range("lr", self.lr)
        in_range("weight_decay", self.weight_decay)

    @staticmethod
    def of(group: dict[str, Any]) -> GroupSettings:
        """Return the settings of a parameter group, checked again."""
        return GroupSettings(**{entry.name: group[entry.name] for entry in fields(GroupSettings)})


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the whole optimizer; `KFAC` explains them.

    Raises:
        ValueError: If a number is out of range.
    """

    momentum: Schedule | None
    damping: Schedule | None
    factor_decay: float
    factor_update_period: int
    inverse_update_period: int
    kl_clip: float | None

    def __post_init__(self) -> None:
        in_range("factor_decay", self.factor_decay, below=1.0)
        for name in ("factor_update_period", "inverse_update_period"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.kl_clip is not None:
            in_range("kl_clip", self.kl_clip, positive=True)
        if not callable(self.momentum):
            self.momentum_at(0)
        if not callable(self.damping):
            self.damping_at(0)

    def momentum_at(self, step: int) -> float | None:
        """Return the momentum given for a step, or ``None`` if none is given."""
        value = self.momentum(step) if callable(self.momentum) else self.momentum
        return None if value is None else in_range("momentum", value, below=1.0)

    def damping_at(self, step: int) -> float | None:
        """Return the damping given for a step, or ``None`` if none is given."""
        value = self.damping(step) if callable(self.damping) else self.damping
        return None if value is None else in_range("damping", value, positive=True)


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


def is_due(step: int, last: int | None, period: int) -> bool:
    """Tell whether work is due that is done every ``period`` steps, and more often early.

    It is due when the number of steps has grown by a tenth since the last time, at the
    latest ``period`` steps after it.
    """
    return last is None or step - last >= min(period, max(1, step // 10))
