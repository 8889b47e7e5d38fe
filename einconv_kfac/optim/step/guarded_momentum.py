"""The slow momentum, added to a step unless the objective grows by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einconv_kfac.optim.step.layer_products import LayerProducts
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.reduction import Before, Reduction
from einconv_kfac.optim.step.slow_momentum import SlowMomentum
from einconv_kfac.optim.vectors import Direction


@dataclass(frozen=True)
class GuardedMomentum:
    """Adds the slow momentum to steps.

    Args:
        slow: The slow momentum.
        reduction: Evaluates the objective.
        safeguard: Whether the momentum is dropped if the objective has grown on its own batch.
    """

    slow: SlowMomentum
    reduction: Reduction
    safeguard: bool

    def add_(
        self,
        objective: Objective,
        update: Direction,
        before: Before | None,
        trust: float,
        products: Mapping[str, LayerProducts] | None,
    ) -> float:
        """Add the slow momentum to a step, and return its coefficient.

        Args:
            objective: The objective; its parameters are those after the step on the batch.
            update: That step; the momentum's part is added to it.
            before: The objective before the step.
            trust: The trust in slopes.
            products: The step's inner products by layer, if they are known.
        """
        known = products if all(objective.rates.values()) else None
        own = {name: tensor.clone() for name, tensor in update.items() if self.safeguard}
        coefficient = self.slow.add_(objective, update, trust, known)
        if before is None or not self.safeguard:
            return coefficient
        if bool(self.reduction.value(objective) <= before.allowed()):
            return coefficient
        for name, tensor in own.items():
            objective.parameters[name].add_(tensor - update[name])
            update[name].copy_(tensor)
        self.slow.drop_(objective.memory)
        return 0.0
