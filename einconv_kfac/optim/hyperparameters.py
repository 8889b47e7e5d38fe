"""The hyper-parameters of the optimizer: one frozen, validated value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from einconv_kfac.optim.schedule import Schedule

Clip: TypeAlias = Schedule | Literal["auto"] | None
"""A bound, ``None`` for none, or ``"auto"`` for the default of the mode."""

DEFAULT_DAMPING = 0.03
DEFAULT_MOMENTUM = 0.9
DEFAULT_KL_CLIP = 1e-3

GROUP_OVERRIDES = (
    "lr",
    "weight_decay",
    "momentum",
    "damping",
    "factor_decay",
    "factor_update_period",
    "inverse_update_period",
)
"""What a parameter group may set, as numbers."""
_SCHEDULED = ("damping", "kl_clip", "max_step_norm", "factor_decay", "momentum")
PERIODS = ("factor_update_period", "inverse_update_period")
_FIXED_ONLY = ("nesterov", "decoupled_weight_decay", "max_step_norm", "kl_clip")


@dataclass(frozen=True)
class Hyperparameters:
    """Hyper-parameters of the optimizer, or of one parameter group.

    `einconv_kfac.KFAC` explains them. ``damping``, ``momentum``, ``factor_decay``, ``kl_clip``,
    ``max_step_norm`` and the periods may be functions of the step; `at` returns the numbers.

    Raises:
        ValueError: If a number is out of range, or holds for the other mode only.
    """

    lr: float = 1.0
    weight_decay: float = 0.0
    momentum: Schedule | None = None
    damping: Schedule | None = None
    factor_decay: Schedule = 0.95
    factor_update_period: Schedule = 10
    inverse_update_period: Schedule = 100
    kl_clip: Clip = "auto"
    max_step_norm: Schedule | None = None
    adaptive: bool = True
    nesterov: bool = False
    decoupled_weight_decay: bool = False
    safeguard: bool = False
    factor_fraction: float = 1.0
    curvature_fraction: float = 1.0

    def __post_init__(self) -> None:
        in_range("lr", self.lr)
        in_range("weight_decay", self.weight_decay)
        for name in _SCHEDULED:
            value = getattr(self, name)
            if value is None or callable(value) or (name == "kl_clip" and value == "auto"):
                continue
            if name in ("factor_decay", "momentum"):
                in_range(name, value, below=1.0)
            else:
                in_range(name, value, positive=True)
        for name in PERIODS:
            if not callable(value := getattr(self, name)):
                positive_integer(name, value)
        for name in ("factor_fraction", "curvature_fraction"):
            fraction(name, getattr(self, name))
        self._check_mode()

    def _check_mode(self) -> None:
        """Raise a ``ValueError`` if a value holds for the other mode only."""
        if not isinstance(self.safeguard, bool):
            raise ValueError(f"`safeguard` must be True or False, got {self.safeguard!r}.")
        if self.adaptive:
            for name in _FIXED_ONLY:
                if (value := getattr(self, name)) and value != "auto":
                    raise ValueError(
                        f"`{name}` must not be set when adaptive=True, got {value!r}: the "
                        "quadratic model chooses momentum and size of the step, and weight decay "
                        "is part of it. Leave it out, or pass adaptive=False."
                    )
        elif self.curvature_fraction != 1:
            raise ValueError(
                "`curvature_fraction` must be 1 when adaptive=False, which has no quadratic "
                f"model, got {self.curvature_fraction}. Leave it out, or pass adaptive=True."
            )
        if self.safeguard and not (self.adaptive and self.damping is None):
            raise ValueError(
                "`safeguard` must be False where adaptive=False or a `damping` is given, got "
                "True: it corrects the damping. Leave `damping` out, and pass adaptive=True."
            )

    def at(self, step: int) -> Hyperparameters:
        """Return the numbers for a step, checked again."""
        names = (*_SCHEDULED, *PERIODS)
        values = {name: getattr(self, name) for name in names}
        numbers = {name: value(step) for name, value in values.items() if callable(value)}
        return replace(self, **numbers) if numbers else self

    def with_overrides(self, group: Mapping[str, Any]) -> Hyperparameters:
        """Return the hyper-parameters of a parameter group, checked again.

        Args:
            group: Numbers by name; ``None`` stands for the optimizer's.
        """
        given = {name: group[name] for name in GROUP_OVERRIDES if group.get(name) is not None}
        return replace(self, safeguard=False, **given)

    def group_defaults(self) -> dict[str, Any]:
        """Return what a new parameter group starts from, see `with_overrides`."""
        own = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {**dict.fromkeys(GROUP_OVERRIDES), **own}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def kl_bound(self) -> float | None:
        """Return the bound that ``kl_clip`` stands for with fixed rates."""
        return DEFAULT_KL_CLIP if self.kl_clip == "auto" else number_or_none(self.kl_clip)

    def norm_bound(self) -> float | None:
        """Return the bound on the norm of a step with fixed rates."""
        return number_or_none(self.max_step_norm)


def number_or_none(value: Any) -> float | None:
    """Return a number that `Hyperparameters.at` has taken from its schedule, or ``None``."""
    return None if value is None else float(value)


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
