"""Norms of parameters that a step leaves as they are, where a weight does not depend on them.

The parameter of a normalized weight moves along a sphere. A step along a tangent leads out of it,
to second order. Since steps are proportional to the norm, the norm would grow in each by a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from einconv_kfac.curvature.layers.computed_weight import ComputedWeight
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.step.in_place import add_
from einconv_kfac.optim.step.objective import Memory
from einconv_kfac.optim.step.rollback import MOMENTUM_BUFFER
from einconv_kfac.optim.vectors import Direction, precise


@dataclass(frozen=True)
class HeldNorms:
    """The norms before a step.

    Args:
        known: The weight and the norms, by the name of the parameter that has them.
    """

    known: Mapping[str, tuple[ComputedWeight, Tensor]]

    @staticmethod
    def of(layers: Mapping[str, RunningFactors], parameters: Direction) -> HeldNorms:
        """Return the present norms of what layers compute their weights from.

        Args:
            layers: The layers.
            parameters: The parameters that a step may change, by name.
        """
        known = {}
        for running in layers.values():
            layer = running.layer
            own = parameters.get(layer.weight)
            weight = None if layer.computed is None else layer.computed.computed
            if weight is not None and weight.ignores_norm and own is not None:
                known[layer.weight] = weight, _size(weight, own)
        return HeldNorms(known)

    def held(self, name: str, value: Tensor) -> Tensor:
        """Return a new value of a parameter, scaled to the norms before the step."""
        if name not in self.known:
            return value
        weight, before = self.known[name]
        own = value.to(precise(value.dtype))
        return (own * (before / _size(weight, own))).to(value.dtype)

    def restore_(self, parameters: Direction, memory: Memory) -> None:
        """Scale parameters to the norms before a step; what was added counts as part of the step.

        Args:
            parameters: The parameters after the step.
            memory: The optimizer's state, whose last update is replaced.
        """
        names = [name for name in self.known if name in parameters]
        if not names:
            return
        added = [self.held(name, parameters[name]) - parameters[name] for name in names]
        add_([parameters[name] for name in names], added)
        for name, own in zip(names, added):
            if MOMENTUM_BUFFER in memory[name]:
                memory[name][MOMENTUM_BUFFER] = memory[name][MOMENTUM_BUFFER] + own


def _size(weight: ComputedWeight, first: Tensor) -> Tensor:
    """Return the norms of the first parameter of a weight."""
    return weight.size(first.detach().to(precise(first.dtype)))
