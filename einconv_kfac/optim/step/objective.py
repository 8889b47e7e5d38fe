"""The objective of one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.parameters import check_dense
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import Direction, sum_of

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

    def value(self) -> Tensor:
        """Return the objective from the recorded losses, for the present parameters."""
        return self.with_decay([batch.weight * batch.loss for batch in self.batches])

    def with_decay(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum of losses and of the weight decay's part of the objective."""
        norms = [
            0.5 * weight * self.parameters[name].double().square().sum()
            for name, weight in self.decay.items()
            if weight
        ]
        return sum_of([*(loss.double() for loss in losses), *norms])


@dataclass(frozen=True)
class Point:
    """Parameters that have a gradient, and the hyper-parameters of all.

    Args:
        parameters: Parameters by name.
        gradient: Gradient by name, weight decay included.
        decay: Weight decay that is part of the objective, by name.
        by_parameter: Hyper-parameters of each parameter's group, by name.
    """

    parameters: Direction
    gradient: Direction
    decay: Mapping[str, float]
    by_parameter: Mapping[str, Hyperparameters]

    @staticmethod
    def of(
        groups: Iterable[Mapping[str, Any]],
        names: Mapping[nn.Parameter, str],
        settings: Hyperparameters,
        scale: Tensor | None,
    ) -> Point:
        """Return the present point.

        Args:
            groups: Parameter groups.
            names: Names of their parameters.
            settings: The optimizer's hyper-parameters, which groups override.
            scale: The factor of a gradient scaler, or ``None``.
        """
        parameters: Direction = {}
        gradient: Direction = {}
        decay: dict[str, float] = {}
        by_parameter: dict[str, Hyperparameters] = {}
        for group in groups:
            own = settings.with_overrides(group)
            weight_decay = 0.0 if own.decoupled_weight_decay else own.weight_decay
            for parameter in group["params"]:
                by_parameter[name := names[parameter]] = own
                if parameter.grad is None:
                    continue
                check_dense(name, parameter.grad)
                parameters[name], decay[name] = parameter, weight_decay
                gradient[name] = parameter.grad if scale is None else parameter.grad / scale
                if own.maximize:
                    gradient[name] = -gradient[name]
                if weight_decay:
                    gradient[name] = gradient[name].add(parameter, alpha=weight_decay)
        return Point(parameters, gradient, decay, by_parameter)

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
    ) -> Objective:
        """Return the objective of a step from here; see `Objective` for the arguments."""
        at = (self.parameters, self.gradient, self.decay, self.rates, settings, self.by_parameter)
        return Objective(*at, batches, others, memory)


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


def without_scaler(batches: Sequence[Batch], scale: Tensor | None, reduction: str) -> list[Batch]:
    """Return batches whose weights lack a gradient scaler's factor.

    Args:
        batches: The batches.
        scale: The factor, or ``None`` if the gradients were unscaled before the step: the
            objective is then taken to be the mean or the sum of the recorded losses.
        reduction: ``"mean"`` or ``"sum"``.
    """
    if not batches:
        return []
    if scale is None:
        total = sum_of([batch.weight for batch in batches])
        scale = total if reduction == "mean" else total / len(batches)
    return [replace(batch, weight=batch.weight / scale.to(batch.weight)) for batch in batches]


def memory_of(parameters: Direction, state: Mapping[Any, dict[str, Any]]) -> Memory:
    """Return the optimizer's state by parameter name, moved to its parameter's device and dtype.

    Args:
        parameters: Parameters by name.
        state: The state by parameter.
    """
    memory = {name: state[parameter] for name, parameter in parameters.items()}
    for name, own in memory.items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                own[key] = value.to(parameters[name])
    return memory
