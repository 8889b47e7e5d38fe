"""How far steps are followed, layer by layer, as the next batches' gradients tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, inner, layer_of

SMALLEST, CONFIDENT, LARGEST = 0.5, 2.0, 16.0
"""Multiples of a batch's minimum: what is followed at least, what as long as noise has not spoilt
it, and what at most where batches agree that it was too short."""
FIRST = 0.75
"""The first gain."""
LEAST_LATER = 0.25
"""The part that is followed later, at least."""
GROWTH, SHRINKAGE = 0.2, 0.3
"""Rates at which gains change, per coefficient of the slow momentum."""
TOLERANCE = 0.36
"""Ascent along the mean step of the past up to which a gain grows, as a multiple of what a batch
promises for its own step, per coefficient. Where there is nothing but noise it is above 1."""
REACH = 0.1
"""Norm of the momentum, relative to that of the layer's parameters, up to which a gain grows where
batches do not ask for it. In directions without curvature, noise ascends so little that it adds up
unnoticed, until the parameters are large and nothing in the layer changes any more."""


@dataclass
class _Layer:
    """What is known of a layer.

    Attributes:
        gain: How far its steps are followed.
        steps: The sum of the weights with which steps are in the momentum.
        confirmed: Descent along the mean step of the past, as an average over the latest batches.
        promised: Reduction that batches promise for their own steps, likewise.
    """

    gain: float = FIRST
    steps: float = 0.0
    confirmed: float = 0.0
    promised: float = 0.0


class Gains:
    """The factors by which the steps of layers are followed altogether.

    The slow momentum ``m`` is a sum of steps, ``v`` their mean. For the gradient ``g`` of a new
    batch, which knows nothing of the noise in ``v``, and the minimum ``u`` of its own quadratic
    model, ``-g.v`` is compared with ``-g.u / 2``. It is positive where steps were too
    short for what batches agree on, about zero where they were noise, and negative where they
    went too far, or where noise has moved the parameters and the model pulls them back.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    @property
    def by_layer(self) -> dict[str, float]:
        """The gains, by the name of the layer."""
        return {layer: known.gain for layer, known in self._layers.items()}

    @property
    def mean(self) -> float:
        """The mean over layers."""
        gains = self.by_layer.values()
        return sum(gains) / len(gains) if gains else FIRST

    def learn_(
        self,
        objective: Objective,
        momentum: Direction,
        update: Direction,
        weight: float,
        signal: float,
    ) -> None:
        """Learn from a new batch, and count its step.

        Args:
            objective: The objective on the batch.
            momentum: ``m``, times learning rates.
            update: The step on the batch, times learning rates.
            weight: The coefficient of the momentum.
            signal: The fraction of ``u`` that ``update`` is.
        """
        names: dict[str, list[str]] = {}
        for name in update:
            if objective.rates[name]:
                names.setdefault(layer_of(name), []).append(name)
        moving = {
            layer: found
            for layer, found in names.items()
            if layer in self._layers and not momentum.keys().isdisjoint(found)
        }
        if moving:
            products = [_products(n, objective, momentum, update) for n in moving.values()]
            for layer, row in zip(moving, torch.stack(products).tolist()):
                self._adapt_(self._layers[layer], row, weight, signal)
        for layer in names:
            known = self._layers.setdefault(layer, _Layer())
            known.steps = (1 - weight) * (known.steps + self.later(layer, signal))

    def _adapt_(self, known: _Layer, row: list[float], weight: float, signal: float) -> None:
        """Adapt the gain of a layer to its products."""
        if not known.steps:
            return
        along_past, along_own, length, size = row
        known.confirmed += weight * (-along_past / known.steps - known.confirmed)
        known.promised += weight * (-along_own / (2 * signal) - known.promised)
        tolerable = -known.confirmed < TOLERANCE * weight * known.promised
        is_near = length < REACH**2 * size and known.gain < CONFIDENT
        grows = known.confirmed > 0 or (tolerable and is_near)
        gain = known.gain * math.exp(weight * (GROWTH if grows else -SHRINKAGE))
        known.gain = min(max(gain, SMALLEST), LARGEST)

    def later(self, layer: str, signal: float) -> float:
        """Return how much of ``u`` is followed later, for a layer that has had a step."""
        return max(self._layers[layer].gain - signal, LEAST_LATER)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the state as numbers."""
        return {layer: asdict(known) for layer, known in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take over a state."""
        self._layers = {layer: _Layer(**known) for layer, known in state.items()}


def _products(
    names: Sequence[str], objective: Objective, momentum: Direction, update: Direction
) -> Tensor:
    """Return ``g.m``, ``g.u``, ``m.m`` and ``w.w`` of a layer with the parameters ``w``."""
    pairs = (
        (objective.gradient, momentum),
        (objective.gradient, update),
        (momentum, momentum),
        (objective.parameters, objective.parameters),
    )
    return torch.stack([inner({n: a[n] for n in names if n in a}, b) for a, b in pairs])
