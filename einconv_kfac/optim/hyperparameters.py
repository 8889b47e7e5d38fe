"""The hyper-parameters of the optimizer: one frozen, validated value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast

from einconv_kfac.curvature.arguments import (
    NUMBER_END,
    flag,
    fraction,
    given_damping,
    in_range,
    positive_integer,
)
from einconv_kfac.optim.schedule import Schedule, value_at

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
_FUNCTIONS = (*_SCHEDULED, *PERIODS)
_OPTIONAL = ("damping", "kl_clip", "max_step_norm", "momentum")
_FRACTIONS = ("factor_fraction", "curvature_fraction")
_NUMBERS = ("lr", "weight_decay", *_SCHEDULED, *PERIODS, *_FRACTIONS)
_FLAGS = (
    *("adaptive", "nesterov", "decoupled_weight_decay", "safeguard", "maximize"),
    "capturable",
)
_FIXED_ONLY = ("nesterov", "max_step_norm", "kl_clip")


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
    maximize: bool = False
    capturable: bool = False
    factor_fraction: float = 1.0
    curvature_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in _FLAGS:
            flag(name, getattr(self, name))
        known = {name: self._checked(name, getattr(self, name)) for name in _NUMBERS}
        for name, value in known.items():  # tensors and other libraries' scalars become numbers
            object.__setattr__(self, name, value)
        self._check_mode()

    def _checked(self, name: str, value: Any) -> Any:
        """Return a number as plain Python; functions of the step, and ``None``, stay."""
        may_be_function = name in _SCHEDULED or name in PERIODS
        if may_be_function and callable(value):
            return value
        if (value is None and name in _OPTIONAL) or (name == "kl_clip" and _is_auto(value)):
            return value
        if name in PERIODS:
            return positive_integer(name, value)
        if name in _FRACTIONS:
            return fraction(name, value)
        if name == "damping":
            return given_damping(value)
        below = 1.0 if name in ("factor_decay", "momentum") else NUMBER_END
        return in_range(name, value, below=below, positive=name in ("kl_clip", "max_step_norm"))

    def _check_mode(self) -> None:
        """Raise a ``ValueError`` if a value holds for the other mode only."""
        if self.adaptive:
            for name in _FIXED_ONLY:
                if (value := getattr(self, name)) and not _is_auto(value):
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
        if self.capturable:
            self._check_capturable()

    def _check_capturable(self) -> None:
        """Raise a ``ValueError`` if the host decides something in steps that may be captured."""
        if self.adaptive:
            raise ValueError(
                "`capturable` must be False when adaptive=True, got True: the host chooses the "
                "size of each step. Pass adaptive=False with `lr`, or leave `capturable` out."
            )
        for name in _SCHEDULED:
            if callable(value := getattr(self, name)) and name != "factor_decay":
                raise ValueError(
                    f"`{name}` must be a number when capturable=True, got {value!r}: a captured "
                    "step repeats the number that it was captured with. Pass a number, or capture "
                    "no step."
                )

    def at(self, step: int) -> Hyperparameters:
        """Return the numbers for a step, checked again."""
        given = [(name, getattr(self, name)) for name in _FUNCTIONS]
        numbers = {name: value_at(name, own, step) for name, own in given if callable(own)}
        return replace(self, **numbers) if numbers else self

    def with_overrides(self, group: Mapping[str, Any]) -> Hyperparameters:
        """Return the hyper-parameters of a parameter group, checked again.

        Args:
            group: Numbers by name; ``None`` stands for the optimizer's.
        """
        for name in sorted(_OWN & group.keys()):
            raise ValueError(
                f"`{name}` must be the same for all parameters, got {group[name]!r} in a parameter "
                f"group. A group may set {', '.join(GROUP_OVERRIDES)}; pass `{name}` to the "
                "optimizer."
            )
        given = {name: group[name] for name in GROUP_OVERRIDES if group.get(name) is not None}
        for name, value in given.items():
            if callable(value):
                raise ValueError(f"`{name}` of a parameter group must be a number, got {value!r}.")
        if {type(value) for value in (*given.values(), *vars(self).values())} <= IMMUTABLE:
            return _overridden(self, **given)
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
        return DEFAULT_KL_CLIP if _is_auto(self.kl_clip) else number_or_none(self.kl_clip)

    def norm_bound(self) -> float | None:
        """Return the bound on the norm of a step with fixed rates."""
        return number_or_none(self.max_step_norm)


_OWN = {entry.name for entry in fields(Hyperparameters)} - set(GROUP_OVERRIDES)
"""What the optimizer alone sets."""


IMMUTABLE = frozenset({int, float, bool, str, type(None)})
"""Types of numbers that never change in place."""


@lru_cache(maxsize=64, typed=True)
def _overridden(settings: Hyperparameters, **given: Any) -> Hyperparameters:
    """Return settings with other numbers, which most steps share with the step before."""
    return replace(settings, safeguard=False, **given)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


@dataclass(frozen=True)
class GroupSettings:
    """The hyper-parameters of one step: of the optimizer, and of parameters in groups.

    Args:
        own: The optimizer's numbers.
        by_parameter: The numbers of each parameter's group, by parameter name.
    """

    own: Hyperparameters
    by_parameter: Mapping[str, Hyperparameters] = field(default_factory=dict)

    def numbers(self, name: str, weights: Mapping[str, str]) -> dict[str, Any]:
        """Return a hyper-parameter of layers.

        Args:
            name: The hyper-parameter.
            weights: The names of the layers' weights.
        """
        given, own = self.by_parameter, self.own
        return {layer: getattr(given.get(w, own), name) for layer, w in weights.items()}

    def dampings(
        self, weights: Mapping[str, str], default: float, decay: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the dampings of layers, with their weight decay.

        Args:
            weights: The names of the layers' weights.
            default: The damping where the weight's group sets none.
            decay: Weight decay by parameter name.
        """
        given = {name: self.by_parameter.get(weight) for name, weight in weights.items()}
        own = {
            name: default if each is None or each.damping is None else cast("float", each.damping)
            for name, each in given.items()
        }
        return {name: own[name] + decay.get(weight, 0.0) for name, weight in weights.items()}


def number_or_none(value: Any) -> float | None:
    """Return a number that `Hyperparameters.at` has taken from its schedule, or ``None``."""
    return None if value is None else float(value)
