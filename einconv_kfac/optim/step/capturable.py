"""The step with fixed rates for CUDA graphs: without decisions of the host, in memory that stays.

A graph repeats the operations that were captured, on the same memory. An ordinary step, one
that neither updates nor inverts factors, therefore writes momentum and parameters in place, and
takes learning rates from the device. Where a number is not finite, the device leaves both as they
are, and nobody reports it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.static_inverses import keep_memory_, present_inverses
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.step.clipping import clip_
from einconv_kfac.optim.step.fixed import FixedStep
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.parameter_change import ParameterChange
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER
from einconv_kfac.optim.step.selection import or_others, or_zero
from einconv_kfac.optim.step.step_protocol import Taken
from einconv_kfac.optim.vectors import Direction, precise

Rate: TypeAlias = float | Tensor


class CapturableStep(FixedStep):
    """`FixedStep`, whose ordinary steps a CUDA graph can repeat.

    The order of operations differs from that of `FixedStep` where a learning rate is a tensor, and
    with it the rounding of the update.
    """

    def check(self, objective: Objective) -> None:
        """See `Step`."""
        for name, rate in objective.rate_tensors.items():
            if name in objective.parameters and rate.device != objective.parameters[name].device:
                raise RuntimeError(
                    "`lr` must be on the device of the parameters when capturable=True, got "
                    f"{rate.device} for '{name}' on {objective.parameters[name].device}. "
                    "Move the tensor there, or pass a number."
                )

    def take_(self, objective: Objective) -> Taken:
        """See `Step`; the inverses that follow use the memory of those before."""
        layers = self._curvature.layers
        before = present_inverses(layers)
        taken = super().take_(objective)
        targets, values = keep_memory_(layers, before)
        if not targets:
            return taken
        return replace(taken, changes=[*taken.changes, ParameterChange.replacing(targets, values)])

    def _moved(self, objective: Objective, direction: Direction, damping: float) -> Taken:
        """See `FixedStep`."""
        clip = clip_(direction, objective)
        steps = {**direction, **objective.others}
        alike: dict[Hashable, list[str]] = defaultdict(list)
        for name in objective.parameters:
            rate = _rate(objective, name)
            key = id(rate) if isinstance(rate, Tensor) else rate
            alike[key, self._momentum_of(objective, name)].append(name)
        moved: dict[str, tuple[Tensor, float]] = {}
        changes: list[ParameterChange] = []
        for names in alike.values():
            momentum = self._momentum_of(objective, names[0])
            velocities = _velocities_(objective, names, steps, momentum, changes)
            added = _times(velocities, _rate(objective, names[0]))
            moved.update({name: (own, 1.0) for name, own in zip(names, added)})
            changes.append(_change(objective, names, added))
        return Taken({"damping": damping, "clip": clip}, moved, changes=changes)


def check_capture(settings: Hyperparameters, curvature: RunningCurvature) -> None:
    """Raise a ``RuntimeError`` if the coming step cannot be captured in a CUDA graph.

    Args:
        settings: The hyper-parameters.
        curvature: Running curvature of the model.
    """
    if not settings.capturable:
        raise RuntimeError(
            "`capturable` must be True for a step that is captured in a CUDA graph, got False. "
            "Pass KFAC(..., adaptive=False, capturable=True)."
        )
    if not curvature.is_ordinary:
        raise RuntimeError(
            "`step` must be an ordinary one to be captured in a CUDA graph, got one that updates "
            "or inverts factors. Take it outside of the capture, until `can_replay` returns True."
        )


def check_begun(objective: Objective, moments: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a ``RuntimeError`` if a captured step would begin something in each repetition.

    Args:
        objective: The objective.
        moments: What the fallback will keep, by parameter name.
    """
    if not objective.finite.is_late:
        raise RuntimeError(
            "`step` must be without a gradient scaler to be captured in a CUDA graph, got one. "
            "Take it outside of the capture."
        )
    memory = objective.memory
    needed = {name: {MOMENTUM_BUFFER, *moments.get(name, ())} for name in memory}
    if name := next((name for name in memory if needed[name] - memory[name].keys()), None):
        raise RuntimeError(
            "`step` must have been taken with each parameter before it is captured in a CUDA "
            f"graph, got '{name}' without momentum or averages. Take a step outside of the capture."
        )


def _rate(objective: Objective, name: str) -> Rate:
    """Return the learning rate of a parameter."""
    return objective.rate_tensors.get(name, objective.rates[name])


def _times(velocities: Sequence[Tensor], rate: Rate) -> list[Tensor]:
    """Return velocities times minus a learning rate."""
    return list(torch._foreach_mul(list(velocities), -rate))


def _velocities_(
    objective: Objective,
    names: Sequence[str],
    steps: Direction,
    momentum: float,
    changes: list[ParameterChange],
) -> list[Tensor]:
    """Return the velocities of parameters that share a momentum, Nesterov's if they are asked for.

    The change of buffers that exist is added to the changes that end the step.
    """
    memory, found = objective.memory, {}
    for name in names:
        if MOMENTUM_BUFFER not in memory[name]:
            first = steps[name].clone(memory_format=torch.contiguous_format)
            memory[name][MOMENTUM_BUFFER] = found[name] = first.to(precise(first.dtype))
    if known := [name for name in names if name not in found]:
        buffers = [memory[name][MOMENTUM_BUFFER] for name in known]
        later = list(torch._foreach_add([steps[n] for n in known], buffers, alpha=momentum))
        found.update(zip(known, later))
        if objective.finite.is_late:
            later = or_others(later, buffers, objective.finite)
        changes.append(ParameterChange.replacing(buffers, later))
    velocities = [found[name] for name in names]
    if objective.settings.nesterov:
        own = [steps[name] for name in names]
        velocities = list(torch._foreach_add(own, velocities, alpha=momentum))
    return velocities


def _change(objective: Objective, names: Sequence[str], added: list[Tensor]) -> ParameterChange:
    """Return the change of parameters that share a rate.

    Args:
        objective: The objective.
        names: The parameters.
        added: Minus the learning rate times the velocities.
    """
    parameters = [objective.parameters[name] for name in names]
    finite = objective.finite
    if not objective.settings.decoupled_weight_decay:
        own = or_zero(added, finite) if finite.is_late else added
        return ParameterChange.adding(parameters, own, 1.0)
    decays = [objective.by_parameter[name].weight_decay for name in names]
    rate = _rate(objective, names[0])
    if isinstance(rate, Tensor):
        values = list(torch._foreach_mul(parameters, 1 - rate * decays[0]))
    else:
        values = list(torch._foreach_mul(parameters, [1 - rate * decay for decay in decays]))
    torch._foreach_add_(values, added)
    if finite.is_late:
        values = or_others(values, parameters, finite)
    return ParameterChange.replacing(parameters, values)
