"""The two modes of the optimizer: which hyper-parameters they take, and which step they make."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.arguments import flag
from einconv_kfac.distributed.detection import stored_model, workers_of
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.step.automatic import AutomaticStep
from einconv_kfac.optim.step.capturable import CapturableStep
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
        kind = CapturableStep if settings.capturable else FixedStep
        return kind(curvature, fallback)
    rule = LevenbergMarquardt() if rule is None else rule
    return AutomaticStep(curvature, rule, settings.safeguard)


def _check_ascent(settings: Hyperparameters) -> None:
    """Raise a ``ValueError`` if an objective is to be maximised by its quadratic model.

    The quadratic model of a negated loss that is convex in the output has no minimum.
    """
    if settings.maximize and settings.adaptive:
        raise ValueError(
            "`maximize` must be False when adaptive=True, whose quadratic model has no maximum, "
            "got True. Minimise the negated objective, `loss = optimizer.observe(-objective)`, or "
            "pass adaptive=False."
        )


def check_settings(settings: Hyperparameters, model: nn.Module, in_background: bool) -> None:
    """Raise a ``ValueError`` if steps are asked for that cannot be taken.

    Args:
        settings: The hyper-parameters.
        model: The model.
        in_background: Whether a thread inverts.
    """
    _check_ascent(settings)
    if not settings.capturable:
        return
    if in_background:
        raise ValueError(
            "`inverse_in_background` must be False when capturable=True, got True: a capture of "
            "the stream would contain the thread's work. Leave one of the two out."
        )
    if (count := workers_of(model).size) > 1 or stored_model(model).is_divided:
        raise ValueError(
            f"`capturable` must be False for a model of several workers, got True for {count}: the "
            "host takes part in their messages. Leave it out."
        )


def group_defaults(settings: Hyperparameters, lr: Any) -> dict[str, Any]:
    """Return what parameter groups start from: a learning rate on the device stays there.

    Args:
        settings: The hyper-parameters.
        lr: The learning rate as it was given.
    """
    own = settings.group_defaults()
    return {**own, "lr": lr} if settings.capturable and isinstance(lr, Tensor) else own
