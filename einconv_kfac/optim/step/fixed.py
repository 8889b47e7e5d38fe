"""The step with fixed rates: momentum on the preconditioned gradient, clipped."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.finiteness import Finiteness
from einconv_kfac.optim.hyperparameters import DEFAULT_DAMPING, DEFAULT_MOMENTUM
from einconv_kfac.optim.state_schema import Record
from einconv_kfac.optim.step.clipping import clip_
from einconv_kfac.optim.step.fallback import Fallback
from einconv_kfac.optim.step.held_norms import HeldNorms
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.parameter_change import ParameterChange
from einconv_kfac.optim.step.reading import read
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER
from einconv_kfac.optim.step.selection import or_others, or_zero
from einconv_kfac.optim.step.step_protocol import Taken
from einconv_kfac.optim.vectors import Direction, norms, precise

NOT_FINITE = "The preconditioned gradient of '{}' was not finite; the step was skipped."


class FixedStep:
    """Heavy-ball or Nesterov momentum with given rates.

    Args:
        curvature: Running curvature of the model.
        fallback: How parameters without factors are trained.
    """

    mode = "fixed"
    moves_parameters = False

    def __init__(self, curvature: RunningCurvature, fallback: Fallback) -> None:
        self._curvature = curvature
        self._fallback = fallback

    def check(self, objective: Objective) -> None:
        """See `Step`: a step with fixed rates needs the gradients alone."""

    def take_(self, objective: Objective) -> Taken:
        """See `Step`."""
        curvature, inverts = self._curvature, self._curvature.inverts()
        if not (objective.finite.is_late or inverts):
            objective.finite.require_()
        settings = objective.settings
        damping = DEFAULT_DAMPING if settings.damping is None else cast("float", settings.damping)
        curvature.update_()
        (curvature.refresh_ if inverts else curvature.set_damping_)(damping, objective.decay)
        direction = curvature.precondition(objective.gradient)
        if inverts and (name := _not_finite(objective, direction)):
            warnings.warn(NOT_FINITE.format(name), RuntimeWarning, stacklevel=7)
            return Taken({"damping": damping})
        return self._moved(objective, direction, damping)

    def _moved(self, objective: Objective, direction: Direction, damping: float) -> Taken:
        """Return the step along a preconditioned gradient.

        Args:
            objective: The objective.
            direction: The preconditioned gradient; it is clipped in place.
            damping: The damping.
        """
        clip = clip_(direction, objective)
        steps = {**direction, **objective.others}
        held = HeldNorms.of(self._curvature.layers, objective.parameters)
        alike: dict[tuple[float, float, bool], list[str]] = defaultdict(list)
        for name in objective.parameters:
            momentum = self._momentum_of(objective, name)
            alike[objective.rates[name], momentum, name in held.known].append(name)
        moved: dict[str, tuple[Tensor, float]] = {}
        changes = []
        for (rate, momentum, is_held), names in alike.items():
            velocities = _velocities_(objective, names, steps, momentum)
            moved.update({name: (own, -rate) for name, own in zip(names, velocities)})
            changes.append(_change(objective, names, velocities, rate, held if is_held else None))
        return Taken({"damping": damping, "clip": clip}, moved, changes=changes)

    def _momentum_of(self, objective: Objective, name: str) -> float:
        """Return a parameter's momentum; Adam's direction has its own."""
        if name in objective.others and self._fallback.has_momentum:
            return 0.0
        given = objective.by_parameter[name].momentum
        return DEFAULT_MOMENTUM if given is None else cast("float", given)

    def state_dict(self) -> dict[str, Any]:
        """See `Step`; there is none beside the momentum, which the optimizer keeps."""
        return {}

    def check_state(self, state: Any, parameters: Mapping[str, Tensor]) -> None:
        """See `Step`."""
        Record({}).check("'step'", state)

    def snapshot(self, parameters: Mapping[str, Tensor]) -> Callable[[], None]:
        """See `Step`."""
        return lambda: None

    def load_state_dict(self, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """See `Step`."""


def _not_finite(objective: Objective, direction: Direction) -> str | None:
    """Return a parameter whose direction is not finite; the host waits for the device once.

    Raises:
        NotFiniteError: If the gradient, a loss or a factor is not finite.
    """
    tensors = [*direction.values()]
    named = {name: [tensor] for name, tensor in direction.items()}
    finite, own = objective.finite, Finiteness(named, lambda: norms(tensors))
    (ours,), (theirs,) = read(own.flag, own.flag if finite.is_known else finite.flag)
    finite.confirm_(finite.is_known or theirs)
    return None if ours else own.fault(own.by_entry().tolist())


def _change(
    objective: Objective,
    names: Sequence[str],
    velocities: list[Tensor],
    rate: float,
    held: HeldNorms | None,
) -> ParameterChange:
    """Return the change of parameters that share a rate, and have norms to keep or have none."""
    parameters = [objective.parameters[name] for name in names]
    finite = objective.finite
    is_decaying = objective.settings.decoupled_weight_decay
    if not is_decaying and held is None:
        added = or_zero(velocities, finite) if finite.is_late else velocities
        return ParameterChange.adding(parameters, added, -rate)
    own = objective.by_parameter
    decays = [rate * own[name].weight_decay * is_decaying for name in names]
    values = list(torch._foreach_mul(parameters, [1 - decay for decay in decays]))
    torch._foreach_add_(values, velocities, alpha=-rate)
    if held is not None:
        values = [held.held(name, value) for name, value in zip(names, values)]
    if finite.is_late:
        values = or_others(values, parameters, finite)
    return ParameterChange.replacing(parameters, values)


def _velocities_(
    objective: Objective, names: Sequence[str], steps: Direction, momentum: float
) -> list[Tensor]:
    """Return the velocities of parameters that share a momentum, Nesterov's if they are asked for.

    The optimizer's state gets the velocities without Nesterov's term, as new tensors.
    """
    memory, own = objective.memory, [steps[name] for name in names]
    known = [name for name in names if MOMENTUM_BUFFER in memory[name]]
    if known:
        buffers = [memory[name][MOMENTUM_BUFFER] for name in known]
        moved = torch._foreach_add([steps[name] for name in known], buffers, alpha=momentum)
        for name, buffer in zip(known, moved):
            memory[name][MOMENTUM_BUFFER] = buffer
    for name in names:
        if MOMENTUM_BUFFER not in memory[name]:
            first = steps[name].clone(memory_format=torch.contiguous_format)
            memory[name][MOMENTUM_BUFFER] = first.to(precise(first.dtype))
    velocities = [memory[name][MOMENTUM_BUFFER] for name in names]
    if objective.settings.nesterov:
        velocities = list(torch._foreach_add(own, velocities, alpha=momentum))
    return velocities
