"""The two modes of the optimizer: which hyper-parameters they take, and which step they make."""

from __future__ import annotations

from typing import Any

from einconv_kfac.optim.arguments import flag
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.step.automatic import AutomaticStep
from einconv_kfac.optim.step.damping.levenberg_marquardt import LevenbergMarquardt
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.fallback import Fallback
from einconv_kfac.optim.step.fixed import FixedStep
from einconv_kfac.optim.step.step_protocol import Step


def settings_of(
    *, lr: float | None, damping: Any, adaptive: bool, **others: Any
) -> tuple[Hyperparameters, DampingRule | None]:
    """Return the hyper-parameters, and the damping rule if one is given.

    Args:
        lr: The learning rate, ``None`` for the default of the mode.
        damping: A number, a function of the step, a rule, or ``None``.
        adaptive: The mode.
        others: The other hyper-parameters.

    Raises:
        ValueError: If a value is out of range or holds for the other mode only.
    """
    if lr is None and not flag("adaptive", adaptive):
        raise ValueError(
            "`lr` must be given when adaptive=False, got None. Pass `lr`, or adaptive=True, which "
            "sets the size of each step."
        )
    if isinstance(damping, type):
        raise ValueError(
            f"`damping` must be a number, a function of the step or a rule, got the class "
            f"{damping.__name__}. Pass an instance: {damping.__name__}()."
        )
    rule = damping if isinstance(damping, DampingRule) else None
    if rule is not None and not adaptive:
        raise ValueError(
            "`damping` must be a number or a function of the step when adaptive=False, got the "
            f"rule {type(rule).__name__}. Pass a number, or adaptive=True."
        )
    given: dict[str, Any] = {
        "lr": 1.0 if lr is None else lr,
        "damping": damping if rule is None else None,
    }
    return Hyperparameters(**given, adaptive=adaptive, **others), rule


def step_of(
    curvature: RunningCurvature,
    settings: Hyperparameters,
    rule: DampingRule | None,
    fallback: Fallback,
) -> Step:
    """Return the step of a mode; the rule is that of Levenberg and Marquardt by default."""
    if not settings.adaptive:
        return FixedStep(curvature, fallback)
    rule = LevenbergMarquardt() if rule is None else rule
    return AutomaticStep(curvature, rule, settings.safeguard)


def check_ascent(settings: Hyperparameters) -> None:
    """Raise a ``ValueError`` if an objective is to be maximised by its quadratic model.

    The quadratic model of a negated loss that is convex in the output has no minimum.
    """
    if settings.maximize and settings.adaptive:
        raise ValueError(
            "`maximize` must be False when adaptive=True, whose quadratic model has no maximum, "
            "got True. Minimise the negated objective, `loss = optimizer.observe(-objective)`, or "
            "pass adaptive=False."
        )
