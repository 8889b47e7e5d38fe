"""The gain of the slow momentum, layer by layer, from the gradients of later batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from einconv_kfac.optim.state_schema import FINITE, Each, Record
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts, PendingProducts
from einconv_kfac.optim.step.reading import sent_rows

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
        self, products: Mapping[str, LayerProducts], weight: float, trust: float
    ) -> dict[str, float]:
        """Adapt the gains to a new batch, and count its step.

        Args:
            products: Inner products by layer, with the step on the batch times learning rates as
                update. Layers without momentum have none along past steps.
            weight: The coefficient of the momentum.
            trust: The fraction of ``u`` that the update is.

        Returns:
            The fraction of ``u`` that is left for later steps, by layer.
        """
        remainders: dict[str, float] = {}
        for layer, own in products.items():
            state = self._layers.setdefault(layer, _Layer())
            _adapt_(state, own, weight, trust)
            remainders[layer] = max(state.gain - trust, SMALLEST_REMAINDER)
            state.steps = (1 - weight) * (state.steps + remainders[layer])
        return remainders

    def pending_remainders(
        self,
        products: PendingProducts,
        weight: float,
        trust: float | Tensor,
        factor: float | Tensor,
    ) -> Tensor:
        """Return what `adapt_` will return, for products that the host has not read, ``[layers]``.

        The device only chooses: what a layer's gain becomes if it grows, or if it shrinks, is
        known. Layers whose momentum has vanished are taken for others, see `are_as_expected`.

        Args:
            products: The products of the gradient and of the mix of which the step is a multiple.
            weight: The coefficient of the momentum.
            trust: The fraction of ``u`` that the update is.
            factor: The update, as a multiple of ``trust`` times the mix.
        """
        states = [self._layers.get(layer, _Layer()) for layer in products.layers]
        past, own, momentum, _, parameters = products.totals()
        rows = zip(*(_foreseen(state, weight) for state in states))
        confirmed, slope, promised, bound, grown, shrunk = sent_rows([*rows], own)
        confirmed = torch.addcmul(confirmed, slope, past)
        share = -ASCENT_TOLERANCE * weight**2 / 2
        excess = own * (share * factor) + confirmed + promised
        near = bound * parameters - momentum
        grows = torch.maximum(confirmed, torch.minimum(excess, near)) > 0
        return (torch.where(grows, grown, shrunk) - trust).clamp_min(SMALLEST_REMAINDER)

    def are_as_expected(self, products: Mapping[str, LayerProducts]) -> bool:
        """Return whether `pending_remainders` holds for products that the host has read."""
        return all(
            own.momentum or not self._layers.get(layer, _Layer()).steps
            for layer, own in products.items()
        )

    schema = Each(Record({entry.name: FINITE for entry in fields(_Layer)}))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the state as numbers."""
        return {layer: dict(vars(state)) for layer, state in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take over a state."""
        self._layers = {layer: _Layer(**own) for layer, own in state.items()}


def mean_gain(gains: Mapping[str, float]) -> float:
    """Return the mean over layers."""
    return sum(gains.values()) / len(gains) if gains else FIRST_GAIN


def _adapt_(state: _Layer, own: LayerProducts, weight: float, trust: float) -> None:
    """Adapt the gain of a layer, unless there is no momentum yet."""
    if not (state.steps and own.momentum):
        return
    state.confirmed += weight * (-own.past / state.steps - state.confirmed)
    state.promised += weight * (-own.own / (2 * trust) - state.promised)
    tolerable = -state.confirmed < ASCENT_TOLERANCE * weight * state.promised
    is_near = own.momentum < RELATIVE_LENGTH**2 * own.parameters and state.gain < CONFIDENT_GAIN
    grows = state.confirmed > 0 or (tolerable and is_near)
    state.gain = _changed(state.gain, weight, grows)


def _changed(gain: float, weight: float, grows: bool) -> float:
    """Return a gain after it has grown or shrunk."""
    gain *= math.exp(weight * (GROWTH_RATE if grows else -SHRINKAGE_RATE))
    return min(max(gain, SMALLEST_GAIN), LARGEST_GAIN)


def _foreseen(state: _Layer, weight: float) -> list[float]:
    """Return the numbers of a layer with which the device foresees `_adapt_`."""
    if not state.steps:
        return [0.0, 0.0, 0.0, 0.0, state.gain, state.gain]
    return [
        (1 - weight) * state.confirmed,
        -weight / state.steps,
        ASCENT_TOLERANCE * weight * (1 - weight) * state.promised,
        RELATIVE_LENGTH**2 if state.gain < CONFIDENT_GAIN else 0.0,
        _changed(state.gain, weight, grows=True),
        _changed(state.gain, weight, grows=False),
    ]
