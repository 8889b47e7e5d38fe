"""The gain of the slow momentum, layer by layer, from the gradients of later batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from einconv_kfac.optim.state_schema import NUMBER, Each, Record
from einconv_kfac.optim.vectors import Direction, by_layer, products_by_layer

SMALLEST_GAIN, CONFIDENT_GAIN, LARGEST_GAIN = 0.5, 2.0, 16.0
"""Bounds of the gain: minimum, maximum without evidence, maximum with evidence."""
FIRST_GAIN = 0.75
"""The first gain."""
SMALLEST_REMAINDER = 0.25
"""Smallest part of the gain that is left for later steps."""
GROWTH_RATE, SHRINKAGE_RATE = 0.2, 0.3
"""Rates at which gains change, per coefficient of the slow momentum."""
ASCENT_TOLERANCE = 0.36
"""Ascent along the mean past step up to which a gain grows, as a multiple of the reduction that a
batch promises for its own step, per coefficient. Pure noise has a multiple above 1."""
RELATIVE_LENGTH = 0.1
"""Norm of the momentum, relative to that of the layer's parameters, up to which a gain grows
without evidence. In directions without curvature noise ascends so little that it accumulates
undetected, until the parameters are large and nothing in the layer changes any more."""


@dataclass
class _Layer:
    """The state of a layer.

    Attributes:
        gain: The gain.
        steps: The sum of the weights with which steps are in the momentum.
        confirmed: Descent along the mean past step, averaged over the latest batches.
        promised: Reduction that batches promise for their own steps, averaged likewise.
    """

    gain: float = FIRST_GAIN
    steps: float = 0.0
    confirmed: float = 0.0
    promised: float = 0.0


class LayerGains:
    """The factors by which the steps of layers are multiplied in the long run.

    The slow momentum ``m`` is a sum of steps, ``v`` their mean. For the gradient ``g`` of a new
    batch, which is independent of the noise in ``v``, and the minimum ``u`` of its own quadratic
    model, ``-g.v`` is compared with ``-g.u / 2``. It is positive where steps were too short for
    the part that batches share, about zero where they were noise, and negative where they went
    too far, or where noise has moved the parameters and the model pulls them back.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    @property
    def by_layer(self) -> dict[str, float]:
        """The gains, by the name of the layer."""
        return {layer: state.gain for layer, state in self._layers.items()}

    def adapt_(
        self,
        point: tuple[Direction, Direction],
        momentum: Direction,
        update: Direction,
        weight: float,
        trust: float,
    ) -> dict[str, float]:
        """Adapt the gains to a new batch, and count its step.

        Args:
            point: The parameters, and the gradient on the batch.
            momentum: ``m``, times learning rates.
            update: The step on the batch, times learning rates; its parameters are trained.
            weight: The coefficient of the momentum.
            trust: The fraction of ``u`` that ``update`` is.

        Returns:
            The fraction of ``u`` that is left for later steps, by parameter.
        """
        parameters, gradient = point
        layers = by_layer(update)
        moving = {
            layer: names
            for layer, names in layers.items()
            if layer in self._layers and not momentum.keys().isdisjoint(names)
        }
        pairs = [
            (gradient, momentum),
            (gradient, update),
            (momentum, momentum),
            (parameters, parameters),
        ]
        for layer, row in zip(moving, products_by_layer(moving.values(), pairs)):
            _adapt_(self._layers[layer], row, weight, trust)
        remainders: dict[str, float] = {}
        for layer, names in layers.items():
            state = self._layers.setdefault(layer, _Layer())
            remainder = max(state.gain - trust, SMALLEST_REMAINDER)
            state.steps = (1 - weight) * (state.steps + remainder)
            remainders |= dict.fromkeys(names, remainder)
        return remainders

    schema = Each(Record({entry.name: NUMBER for entry in fields(_Layer)}))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the state as numbers."""
        return {layer: asdict(state) for layer, state in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take over a state."""
        self._layers = {layer: _Layer(**own) for layer, own in state.items()}


def mean_gain(gains: Mapping[str, float]) -> float:
    """Return the mean over layers."""
    return sum(gains.values()) / len(gains) if gains else FIRST_GAIN


def _adapt_(state: _Layer, row: list[float], weight: float, trust: float) -> None:
    """Adapt the gain of a layer to ``g.m``, ``g.u``, ``m.m`` and ``w.w``."""
    if not state.steps:
        return
    along_past, along_own, length, size = row
    state.confirmed += weight * (-along_past / state.steps - state.confirmed)
    state.promised += weight * (-along_own / (2 * trust) - state.promised)
    tolerable = -state.confirmed < ASCENT_TOLERANCE * weight * state.promised
    is_near = length < RELATIVE_LENGTH**2 * size and state.gain < CONFIDENT_GAIN
    grows = state.confirmed > 0 or (tolerable and is_near)
    gain = state.gain * math.exp(weight * (GROWTH_RATE if grows else -SHRINKAGE_RATE))
    state.gain = min(max(gain, SMALLEST_GAIN), LARGEST_GAIN)
