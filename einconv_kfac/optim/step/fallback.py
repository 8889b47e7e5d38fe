"""Directions of the parameters that no Kronecker factor covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction

Fallback: TypeAlias = Literal["adam", "gradient"]
DECAYS = (0.9, 0.999)
WITHOUT_MOMENTUM = (0.0, 0.999)
"""For the automatic step, whose momentum is its own: along averages of old gradients its
quadratic model let parameters run away once the gradient had become small."""
EPSILON = 1e-8
_AVERAGES = ("exp_avg", "exp_avg_sq")


def check_fallback(kind: Fallback) -> Fallback:
    """Return a kind of fallback.

    Raises:
        ValueError: If it is not one.
    """
    if kind not in get_args(Fallback):
        raise ValueError(f"`fallback` must be one of {get_args(Fallback)}, got {kind!r}.")
    return kind


def fallback_direction(
    kind: Fallback,
    gradient: Direction,
    memory: Mapping[str, dict[str, Any]],
    decays: tuple[float, float] = DECAYS,
) -> tuple[Direction, dict[str, dict[str, Any]]]:
    """Return directions of ascent, and what to remember if the step is taken.

    Args:
        kind: ``"gradient"``, or ``"adam"`` for ``m / (sqrt(v) + eps)`` with the bias-corrected
            running averages ``m`` of gradients and ``v`` of their squares (Kingma and Ba, 2015).
        gradient: Gradients by parameter name.
        memory: What is remembered so far, by parameter name.
        decays: Decays of ``m`` and ``v``. With a first of 0, the direction is one of ascent.
    """
    if kind == "gradient":
        return dict(gradient), {}
    moments = {name: _moments(memory[name], g, decays) for name, g in gradient.items()}
    return {name: _adam(own, decays) for name, own in moments.items()}, moments


def with_fallback(
    objective: Objective,
    kind: Fallback,
    plain: Direction,
    memory: Mapping[str, dict[str, Any]],
    adaptive: bool,
) -> tuple[Objective, dict[str, dict[str, Any]]]:
    """Return an objective with the directions of what has no factors, and what to remember.

    Args:
        objective: The objective.
        kind: Kind of fallback.
        plain: Gradients of the parameters without factors.
        memory: What is remembered so far, by parameter name.
        adaptive: Whether the momentum is the automatic step's.
    """
    decays = WITHOUT_MOMENTUM if adaptive else DECAYS
    others, moments = fallback_direction(kind, plain, memory, decays)
    momenta = {**objective.momenta, **dict.fromkeys(moments, 0.0)}  # Adam has its own
    return replace(objective, others=others, momenta=momenta), moments


def _moments(
    state: Mapping[str, Any], gradient: Tensor, decays: tuple[float, float]
) -> dict[str, Any]:
    """Return the running averages after one more gradient."""
    new: dict[str, Any] = {"step": state.get("step", 0) + 1}
    for name, decay, value in zip(_AVERAGES, decays, (gradient, gradient.square())):
        before = state[name] if name in state else torch.zeros_like(value)
        new[name] = before.lerp(value, 1 - decay)
    return new


def _adam(moments: Mapping[str, Any], decays: tuple[float, float]) -> Tensor:
    """Return Adam's direction."""
    mean, square = (
        moments[name] / (1 - decay ** moments["step"]) for name, decay in zip(_AVERAGES, decays)
    )
    direction: Tensor = mean / (square.sqrt() + EPSILON)
    return direction
