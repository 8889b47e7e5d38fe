"""What the last step did, in numbers that are computed when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.step.objective import Statistics
from einconv_kfac.optim.vectors import Direction, layer_of, norms

Moved = Mapping[str, tuple[Tensor, float]]
"""What parameters were moved by: a tensor and a factor, by name."""


@dataclass(frozen=True)
class Report:
    """What the last step did.

    Args:
        numbers: Of the whole model.
        gradients: Norms of the gradients, by parameter name.
        moved: The update.
        gains: How far steps are followed, by the name of the parameters' module.
    """

    numbers: Statistics = field(default_factory=dict)
    gradients: Direction = field(default_factory=dict)
    moved: Moved = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)

    def by_layer(
        self, layers: Mapping[str, RunningFactors], parameters: Direction
    ) -> dict[str, dict[str, float]]:
        """Return numbers by layer; `KFAC.layer_statistics` explains them.

        Args:
            layers: The layers that have factors.
            parameters: The model's parameters, by name.
        """
        return {name: self._of(running, parameters) for name, running in layers.items()}

    def _of(self, running: RunningFactors, parameters: Direction) -> dict[str, float]:
        """Return the numbers of one layer."""
        names = running.layer.parameters
        numbers: dict[str, float] = {
            "gradient_norm": _norm(self.gradients[n] for n in names if n in self.gradients),
            "update_norm": _norm(m[0] * m[1] for n in names if (m := self.moved.get(n))),
            "parameter_norm": _norm(parameters[n] for n in names),
            "factor_seconds": running.factor_seconds,
            "inverse_seconds": running.inverse_seconds,
            "cholesky_retries": float(running.retries),
        }
        if running.inverse is not None and running.conditions is not None:
            a, b = running.conditions.tolist()
            numbers |= {"damping": running.inverse.damping, "condition_a": a, "condition_b": b}
        if (gain := self.gains.get(layer_of(names[0]))) is not None:
            numbers["gain"] = gain
        if "clip" in self.numbers:
            numbers["clip"] = float(self.numbers["clip"])
        return numbers


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of several tensors together."""
    return math.hypot(*(float(norm) for norm in norms(tensors)))
