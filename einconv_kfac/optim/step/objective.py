"""The objective of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.shards import WHOLE, WholeModel
from einconv_kfac.distributed.stored import all_stored, graph_leaves
from einconv_kfac.distributed.workers import ALONE, Workers
from einconv_kfac.optim.factors.finiteness import KNOWN, Finiteness
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.parameters import check_dense
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.step.fallback import COUNT_KEY
from einconv_kfac.optim.vectors import Direction, precise, scaled, squared_norm, sum_of

Memory: TypeAlias = Mapping[str, dict[str, Any]]
"""The optimizer's state, by parameter name."""


@dataclass(frozen=True)
class Objective:
    """The objective of one step, at the present parameters.

    Args:
        parameters: Parameters by name.
        gradient: Gradient by name, weight decay included.
        decay: Weight decay that is part of the objective, by name.
        rates: Learning rate by name.
        settings: Hyper-parameters of the optimizer for this step.
        by_parameter: Hyper-parameters of each parameter's group, by name.
        batches: The recorded batches.
        others: Directions of ascent of the parameters without Kronecker factors.
        memory: The optimizer's state, by name.
        workers: The workers, each with batches of its own; the objective is the mean over them.
        finite: Whether its numbers are finite.
        rate_tensors: Learning rates that are tensors, by name; the host does not read them.
        doubts: Flags that must be set for the batches to be those of a model that repeats its
            outputs, where the host has not read that yet.
    """

    parameters: Direction
    gradient: Direction
    decay: Mapping[str, float]
    rates: Mapping[str, float]
    settings: Hyperparameters
    by_parameter: Mapping[str, Hyperparameters]
    batches: Sequence[Batch]
    others: Direction
    memory: Memory
    workers: Workers = ALONE
    finite: Finiteness = KNOWN
    rate_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    doubts: Sequence[Tensor] = ()

    def value(self) -> Tensor:
        """Return the objective from the recorded losses, for the present parameters."""
        return self.with_decay([batch.weight * batch.loss for batch in self.batches])

    def with_decay(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum of losses and of the weight decay's part of the objective."""
        norms = [
            0.5 * weight * squared_norm([self.parameters[name] for name in names])
            for weight, names in _names_by_number(self.decay).items()
            if weight
        ]
        own = sum_of([*(loss.double() for loss in losses), *norms])
        return cast("Tensor", self.workers.means([own], "objective")[0])

    def descent(self, ascent: Direction) -> Direction:
        """Return the direction opposite to one; learning rates count relative to the largest."""
        largest = max(self.rates.values()) or 1.0
        return scaled(ascent, {name: -rate / largest for name, rate in self.rates.items()})

    def descents(self, ascents: Sequence[Direction]) -> tuple[Sequence[Direction], float]:
        """Return directions and a factor of all that makes them the opposite ones."""
        rates = {*self.rates.values()}
        if len(rates) == 1 and all(rates):
            return ascents, -1.0
        return [self.descent(ascent) for ascent in ascents], 1.0


@dataclass(frozen=True)
class Point:
    """Parameters that have a gradient, and the hyper-parameters of all.

    Args:
        parameters: Parameters by name.
        gradient: Gradient by name, weight decay included.
        decay: Weight decay that is part of the objective, by name.
        by_parameter: Hyper-parameters of each parameter's group, by name.
        rate_tensors: Learning rates that are tensors, by name.
    """

    parameters: Direction
    gradient: Direction
    decay: Mapping[str, float]
    by_parameter: Mapping[str, Hyperparameters]
    rate_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        groups: Iterable[Mapping[str, Any]],
        names: Mapping[nn.Parameter, str],
        by_parameter: Mapping[str, Hyperparameters],
        divisor: Tensor | None,
        stored: WholeModel = WHOLE,
    ) -> Point:
        """Return the present point.

        Args:
            groups: Parameter groups.
            names: Names of their parameters.
            by_parameter: Hyper-parameters of each parameter's group, by name.
            divisor: What the gradients are divided by, or ``None``.
            stored: How the model is stored; it has whole parameters now.
        """
        every = [p for group in groups for p in group["params"] if p.grad is not None]
        own = {names[p]: p for p in every}
        parameters: Direction = dict(zip(own, graph_leaves(own.values())))
        gradients = stored.whole([g for p in every if (g := p.grad) is not None])
        check_dense(zip(parameters, gradients))
        settings = [by_parameter[name] for name in parameters]
        if divisor is not None and gradients:
            gradients = list(torch._foreach_div(gradients, divisor.to(gradients[0].device)))
        if any(each.maximize for each in settings):
            gradients = list(torch._foreach_neg(gradients))
        gradient = dict(zip(parameters, gradients))
        decay = {
            name: 0.0 if each.decoupled_weight_decay else each.weight_decay
            for name, each in zip(parameters, settings)
        }
        for weight, alike in _names_by_number(decay).items():
            if weight:
                ours, theirs = ([own[name] for name in alike] for own in (gradient, parameters))
                gradient.update(zip(alike, torch._foreach_add(ours, theirs, alpha=weight)))
        rates = _rate_tensors(groups, names, by_parameter)
        return Point(parameters, gradient, decay, by_parameter, rates)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by name."""
        return {name: self.by_parameter[name].lr for name in self.parameters}

    def objective(
        self,
        settings: Hyperparameters,
        batches: Sequence[Batch],
        others: Direction,
        memory: Memory,
        workers: Workers = ALONE,
        finite: Finiteness = KNOWN,
    ) -> Objective:
        """Return the objective of a step from here; see `Objective` for the arguments."""
        at = (self.parameters, self.gradient, self.decay, self.rates, settings, self.by_parameter)
        return Objective(*at, batches, others, memory, workers, finite, self.rate_tensors)


def _rate_tensors(
    groups: Iterable[Mapping[str, Any]],
    names: Mapping[nn.Parameter, str],
    by_parameter: Mapping[str, Hyperparameters],
) -> dict[str, Tensor]:
    """Return the learning rates that the host is not to read, numbers on the device, by name."""
    if not any(own.capturable for own in by_parameter.values()):
        return {}
    own = [(group["lr"], group["params"]) for group in groups]
    known = [(lr.detach().reshape(()), ps) for lr, ps in own if isinstance(lr, Tensor)]
    return {names[p]: rate for rate, parameters in known for p in parameters}


def _names_by_number(numbers: Mapping[str, float]) -> dict[float, list[str]]:
    """Return names by their number."""
    groups: dict[float, list[str]] = defaultdict(list)
    for name, number in numbers.items():
        groups[number].append(name)
    return groups


def on_gpu(objective: Objective) -> bool:
    """Return whether all parameters are on a GPU."""
    return all(own.is_cuda for own in objective.parameters.values())


def is_late(objective: Objective) -> bool:
    """Return whether the device is asked for numbers before the host has read others."""
    return on_gpu(objective) and objective.workers.size == 1


def common_momentum(objective: Objective) -> float | None:
    """Return the momentum of all parameters, or ``None`` for the slow momentum.

    Raises:
        ValueError: If parameter groups differ in it.
    """
    given = {objective.by_parameter[name].momentum for name in objective.parameters}
    if len(given) > 1:
        raise ValueError(
            "`momentum` must be the same in every parameter group when adaptive=True, got "
            f"{sorted(map(str, given))}. Set it for all groups, or pass adaptive=False."
        )
    value = given.pop() if given else None
    return cast("float | None", value)


def memory_of(
    parameters: Direction, state: Mapping[Any, dict[str, Any]], stored: WholeModel = WHOLE
) -> Memory:
    """Return the optimizer's state by parameter name, moved to its parameter's device and dtype.

    The state of a parameter in low precision is kept in float32, and so are counts of steps.

    Args:
        parameters: Parameters by name.
        state: The state by parameter.
        stored: How the model is stored.
    """
    owners = zip(parameters, all_stored(parameters.values()))
    memory = stored.whole_states({name: state[owner] for name, owner in owners})
    for name, own in memory.items():
        device, dtype = parameters[name].device, precise(parameters[name].dtype)
        for key, value in own.items():
            kind = torch.float32 if key == COUNT_KEY else dtype
            if isinstance(value, Tensor) and (value.dtype != kind or value.device != device):
                own[key] = value.to(device, kind)
    return memory
