"""The step with fixed rates: momentum on the preconditioned gradient, clipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.hyperparameters import Constants, Schedule
from einconv_kfac.optim.preconditioner import DEFAULT_DAMPING, KFACPreconditioner
from einconv_kfac.optim.step.clipping import kl_clip_factor, norm_factor
from einconv_kfac.optim.step.objective import Memory, Objective, Statistics
from einconv_kfac.optim.vectors import Direction

DEFAULT_MOMENTUM = 0.9
_BUFFER = "momentum_buffer"


@dataclass(frozen=True)
class FixedOptions:
    """What only the step with fixed rates knows; `KFAC` explains it."""

    nesterov: bool = False
    decoupled_weight_decay: bool = False
    max_step_norm: Schedule | None = None

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
        self.moved: dict[str, tuple[Tensor, float]] = {}
        self.gains: dict[str, float] = {}

    def take_(self, objective: Objective, memory: Memory, constants: Constants) -> Statistics:
        """Take a step, and return its statistics."""
        damping = DEFAULT_DAMPING if constants.damping is None else constants.damping
        self._preconditioner.update_(constants)
        self._preconditioner.refresh_(damping, objective.decay)
        direction = self._preconditioner.precondition(objective.gradient)
        clip = self._clip_(direction, objective, constants)
        if self._options.decoupled_weight_decay:
            self._decay_(objective)
        alike: dict[tuple[float, float], list[str]] = defaultdict(list)
        for name in objective.parameters:
            alike[objective.rates[name], _momentum(objective, name, constants)].append(name)
        steps, self.moved = {**direction, **objective.others}, {}
        for (rate, momentum), names in alike.items():
            velocities = _velocities_(names, steps, memory, momentum)
            own, parameters = ([d[n] for n in names] for d in (steps, objective.parameters))
            if self._options.nesterov:
                velocities = list(torch._foreach_add(own, velocities, alpha=momentum))
            torch._foreach_add_(parameters, velocities, alpha=-rate)
            self.moved |= {name: (v, -rate) for name, v in zip(names, velocities)}
        return {"damping": damping, "clip": clip}

    def _clip_(self, direction: Direction, objective: Objective, constants: Constants) -> Tensor:
        """Clip a direction in place, and return the factor."""
        gradient, rates = objective.gradient, objective.rates
        factor = kl_clip_factor(direction, gradient, rates, constants.kl_clip)
        factor = factor.minimum(norm_factor(direction, rates, constants.max_step_norm).to(factor))
        if constants.kl_clip is not None or constants.max_step_norm is not None:
            alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)
            for tensor in direction.values():
                alike[tensor.dtype].append(tensor)
            for tensors in alike.values():
                torch._foreach_mul_(tensors, factor.to(tensors[0]))
        return factor

    def _decay_(self, objective: Objective) -> None:
        """Shrink the parameters by the rate times the weight decay."""
        rates, groups = objective.rates, self._preconditioner.overrides
        factors = [1 - rates[name] * groups[name].weight_decay for name in objective.parameters]
        torch._foreach_mul_(list(objective.parameters.values()), factors)

    def state_dict(self) -> None:
        """Return the state, of which there is none."""

    def load_state_dict(self, state: Any, parameters: Mapping[str, Tensor]) -> None:
        """Take over a state."""


def _velocities_(
    names: Sequence[str], steps: Direction, memory: Memory, momentum: float
) -> list[Tensor]:
    """Return velocities after a step, and remember them."""
    known = [name for name in names if _BUFFER in memory[name]]
    buffers = [memory[name][_BUFFER] for name in known]
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, [steps[name] for name in known])
    for name in names:
        if _BUFFER not in memory[name]:
            memory[name][_BUFFER] = steps[name].clone(memory_format=torch.contiguous_format)
    return [memory[name][_BUFFER] for name in names]


def _momentum(objective: Objective, name: str, constants: Constants) -> float:
    """Return a parameter's momentum."""
    for given in (objective.momenta[name], constants.momentum):
        if given is not None:
            return given
    return DEFAULT_MOMENTUM
