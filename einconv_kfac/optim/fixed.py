"""The step with fixed rates: momentum on the preconditioned gradient, clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.clipping import kl_clip_factor, norm_factor
from einconv_kfac.optim.objective import Memory, Objective, Statistics
from einconv_kfac.optim.preconditioner import DEFAULT_DAMPING, KFACPreconditioner
from einconv_kfac.optim.settings import Constants, Schedule

DEFAULT_MOMENTUM = 0.9


@dataclass(frozen=True)
class FixedOptions:
    """What only the step with fixed rates knows; `KFAC` explains it."""

    nesterov: bool = False
    decoupled_weight_decay: bool = False
    norm_constraint: Schedule | None = None

    def check_automatic(self) -> None:
        """Raise a ``ValueError`` if something is set that the automatic step does not know."""
        for name, value in vars(self).items():
            if value:
                raise ValueError(
                    f"`{name}` must not be set when adaptive=True, got {value!r}: the quadratic "
                    "model chooses momentum and size of the step, and weight decay is part of it. "
                    "Leave it out, or pass adaptive=False."
                )


class FixedStep:
    """Momentum with given rates.

    Args:
        preconditioner: Preconditions gradients.
        options: What else is set.
    """

    def __init__(self, preconditioner: KFACPreconditioner, options: FixedOptions) -> None:
        self._preconditioner = preconditioner
        self._options = options

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> Statistics:
        """Take a step, and return its statistics."""
        damping = DEFAULT_DAMPING if constants.damping is None else constants.damping
        gradient, rates = objective.gradient, objective.rates
        self._preconditioner.update_(constants)
        self._preconditioner.refresh_(damping, objective.decay)
        direction = self._preconditioner.precondition(gradient)
        clip = kl_clip_factor(direction, gradient, rates, constants.kl_clip)
        clip = clip.minimum(norm_factor(direction, rates, constants.norm_constraint).to(clip))
        if self._options.decoupled_weight_decay:
            self._decay_(objective)
        for name, parameter in objective.parameters.items():
            others = objective.others
            step = others[name] if name in others else direction[name] * clip.to(parameter)
            step = self._accelerated_(step, memory[name], _momentum(objective, name, constants))
            parameter.sub_(step, alpha=rates[name])
        return {"damping": damping, "clip": clip}

    def _decay_(self, objective: Objective) -> None:
        """Shrink the parameters by the rate times the weight decay."""
        for name, parameter in objective.parameters.items():
            decay = self._preconditioner.overrides[name].weight_decay
            parameter.mul_(1 - objective.rates[name] * decay)

    def _accelerated_(self, step: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
        """Return a step with momentum, and remember it."""
        velocity: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(step))
        velocity.mul_(momentum).add_(step)
        return step.add(velocity, alpha=momentum) if self._options.nesterov else velocity

    def state_dict(self) -> None:
        """Return the state, of which there is none."""

    def load_state_dict(self, state: Any) -> None:
        """Take over a state."""


def _momentum(objective: Objective, name: str, constants: Constants) -> float:
    """Return a parameter's momentum."""
    for given in (objective.momenta[name], constants.momentum):
        if given is not None:
            return given
    return DEFAULT_MOMENTUM
