"""The step with fixed rates: momentum on the preconditioned gradient, clipped."""

from __future__ import annotations

from typing import Any

import torch

from einconv_kfac.optim.clipping import kl_clip_factor
from einconv_kfac.optim.objective import Memory, Objective
from einconv_kfac.optim.preconditioner import DEFAULT_DAMPING, KFACPreconditioner
from einconv_kfac.optim.settings import Constants

DEFAULT_MOMENTUM = 0.9


class FixedStep:
    """Heavy-ball momentum with given rates.

    Args:
        preconditioner: Preconditions gradients.
    """

    def __init__(self, preconditioner: KFACPreconditioner) -> None:
        self._preconditioner = preconditioner

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> dict[str, float]:
        """Take a step, and return its statistics."""
        damping = DEFAULT_DAMPING if constants.damping is None else constants.damping
        momentum = DEFAULT_MOMENTUM if constants.momentum is None else constants.momentum
        gradient, rates = objective.gradient, objective.rates
        self._preconditioner.update_(constants)
        self._preconditioner.refresh_(damping, objective.decay)
        direction = self._preconditioner.precondition(gradient)
        clip = kl_clip_factor(direction, gradient, rates, constants.kl_clip)
        for name, parameter in objective.parameters.items():
            own, others = objective.momenta[name], objective.others
            step = others[name] if name in others else direction[name] * clip.to(parameter)
            velocity = memory[name].setdefault("momentum_buffer", torch.zeros_like(step))
            velocity.mul_(momentum if own is None else own).add_(step)
            parameter.sub_(velocity, alpha=rates[name])
        return {"damping": damping, "clip": float(clip)}

    def state_dict(self) -> None:
        """Return the state, of which there is none."""

    def load_state_dict(self, state: Any) -> None:
        """Take over a state."""
