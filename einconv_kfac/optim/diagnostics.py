"""The report of a step, in numbers that are computed on request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.hyperparameters import GROUP_OVERRIDES, Hyperparameters
from einconv_kfac.optim.step.step_protocol import Taken
from einconv_kfac.optim.vectors import Direction, layer_of, norms


@dataclass(frozen=True)
class Report:
    """The report of the last step.

    Args:
        taken: The step.
        gradients: Norms of the gradients, by parameter name.
        parameters: Norms of the parameters after the step, where workers divide them.
    """

    taken: Taken = field(default_factory=lambda: Taken({}))
    gradients: Direction = field(default_factory=dict)
    parameters: Direction = field(default_factory=dict)

    def without_updates(self) -> Report:
        """Return the report without the updates, which take memory."""
        return replace(self, taken=replace(self.taken, moved={}))

    def numbers(self, layers: Mapping[str, RunningFactors]) -> dict[str, float]:
        """Return the numbers of the whole model; `KFAC.statistics` explains them.

        Args:
            layers: The layers that have factors, by name.
        """
        retries = sum(running.retries for running in layers.values())
        known = {name: float(value) for name, value in self.taken.statistics.items()}
        return {**known, "cholesky_retries": float(retries)}

    def by_layer(
        self, layers: Mapping[str, RunningFactors], parameters: Direction
    ) -> dict[str, dict[str, float]]:
        """Return numbers by layer; `KFAC.layer_statistics` explains them.

        Args:
            layers: The layers that have factors.
            parameters: The model's parameters, by name.
        """
        parameters = {**parameters, **self.parameters}
        return {name: self._of(running, parameters) for name, running in layers.items()}

    def _of(self, running: RunningFactors, parameters: Direction) -> dict[str, float]:
        """Return the numbers of one layer."""
        names = running.layer.parameters
        numbers: dict[str, float] = {
            "gradient_norm": _norm(self.gradients[n] for n in names if n in self.gradients),
            "update_norm": _norm(m[0] * m[1] for n in names if (m := self.taken.moved.get(n))),
            "parameter_norm": _norm(parameters[n] for n in names),
            "factor_seconds": running.factor_seconds,
            "inverse_seconds": running.inverse_seconds,
            "cholesky_retries": float(running.retries),
        }
        if running.inverse is not None and running.conditions is not None:
            a, b = (max(1.0, c) for c in running.conditions.tolist())  # less is rounding
            numbers |= {"damping": running.inverse.damping, "condition_a": a, "condition_b": b}
        if (gain := self.taken.gains.get(layer_of(names[0]))) is not None:
            numbers["gain"] = gain
        if (clip := self.taken.statistics.get("clip")) is not None:
            numbers["clip"] = float(clip)
        return numbers


def description(
    name: str, model: nn.Module, settings: Hyperparameters, groups: Sequence[Mapping[str, Any]]
) -> str:
    """Return a short text about an optimizer: its model, mode, and what was set.

    Args:
        name: Name of its class.
        model: Its model.
        settings: Its hyper-parameters.
        groups: Its parameter groups.
    """
    lines = []
    for index, group in enumerate(groups):
        own = {n: group[n] for n in GROUP_OVERRIDES if group.get(n) is not None}
        lines.append(f"Parameter Group {index}")
        lines += [f"    {n}: {value}" for n, value in own.items()]
        lines.append(f"    parameters: {len(group['params'])}")
    lines += [f"model: {type(model).__name__}", f"adaptive: {settings.adaptive}"]
    if settings.adaptive:
        given = [n for n in ("damping", "momentum") if getattr(settings, n) is None]
        lines.append(f"automatic: {', '.join(['step size', *given])}")
    default = Hyperparameters(lr=settings.lr, adaptive=settings.adaptive)
    changed = {n: v for n, v in settings.arguments().items() if v != getattr(default, n)}
    lines += [f"{n}: {value}" for n, value in changed.items()]
    return "\n".join([f"{name} (", *lines, ")"])


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of several tensors together."""
    return math.hypot(*(float(norm) for norm in norms(tensors)))
