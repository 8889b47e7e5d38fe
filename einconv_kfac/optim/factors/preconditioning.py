"""Inverses applied to gradients: those of small layers of one form together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import is_
from typing import TypeAlias

import torch

from einconv_kfac.curvature.blocks.batching import LARGEST_BATCHED_DIMENSION
from einconv_kfac.curvature.blocks.matrix_layout import (
    divided_matrices,
    joined_matrices,
    mapped_matrices,
)
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.protocol import Inverted, LayerInverse
from einconv_kfac.optim.vectors import Direction

AtHand: TypeAlias = tuple[Layer, LayerInverse]
"""A layer, and its inverse on the device of the gradients."""
Stacks: TypeAlias = list[list[AtHand]]
"""Layers that are preconditioned together."""


class Preconditioning:
    """Applies the inverses of layers to gradients.

    Which layers are preconditioned together is decided again only where inverses have changed, or
    names, data types or devices of gradients.

    Args:
        layers: The layers, by name; others may come.
    """

    def __init__(self, layers: Mapping[str, RunningFactors]) -> None:
        self._layers = layers
        self._inverses: list[LayerInverse | None] = []
        self._gradients: list[tuple[str, torch.dtype, torch.device]] = []
        self._stacks: Stacks = []

    def applied(
        self, gradient: Direction, inverses: Mapping[str, Inverted] | None = None
    ) -> Direction:
        """Return inverses times gradients, at least in float32, in the order of the gradients.

        Args:
            gradient: Gradients by parameter name. Where a layer's bias has none, zero stands for
                it.
            inverses: Inverses by layer, instead of the present ones.
        """
        given = self._with_weights(gradient)
        if inverses is None:
            stacks = self._present_stacks(given)
        else:
            self._stacks, self._inverses = [], []  # others come, and these are not kept
            stacks = _stacks(self._layers, given, inverses)
        result: Direction = {}
        for stack in stacks:
            apply = _applied if len(stack) == 1 else _applied_together
            result.update(apply(stack, given))
        result = self._without_weights(result)
        return {name: result[name] for name in gradient if name in result}

    def _with_weights(self, gradient: Direction) -> Direction:
        """Return gradients with those of computed weights, in place of what they are made of."""
        result = gradient
        for running in self._layers.values():
            layer = running.layer
            if layer.computed is not None and layer.weight in result:
                own = layer.with_weight(result)
                result = {**result} if result is gradient else result
                for name in layer.computed.parameters:
                    result.pop(name, None)
                result.update(own)
        return result

    def _without_weights(self, result: Direction) -> Direction:
        """Return steps with those of computed weights divided between their parameters."""
        for running in self._layers.values():
            layer = running.layer
            if layer.computed is not None and layer.layout.weight in result:
                own = layer.without_weight(result)
                del result[layer.layout.weight]
                result.update(own)
        return result

    def _present_stacks(self, gradient: Direction) -> Stacks:
        """Return what is preconditioned together by the present inverses."""
        given = [(name, own.dtype, own.device) for name, own in gradient.items()]
        found = [running.inverse for running in self._layers.values()]
        if self._gradients != given or not _are_same(self._inverses, found):
            self._stacks = _stacks(self._layers, gradient, None)
            self._inverses = [running.inverse for running in self._layers.values()]
            self._gradients = given
        return self._stacks


def scaled_apart(layers: Iterable[Layer]) -> frozenset[str]:
    """Return the parameters up to the last layer whose factors may be off by a factor of their own.

    Args:
        layers: The layers of a model, in the order in which it defines them, which is taken to be
            that of their calls.
    """
    names: list[str] = []
    apart: frozenset[str] = frozenset()
    for layer in layers:
        names += layer.parameters
        if layer.rule.has_own_scale:
            apart = frozenset(names)
    return apart


def by_scale(direction: Direction, apart: Collection[str]) -> list[Direction]:
    """Return the parts of a direction that have coefficients of their own, without empty ones."""
    if not apart:
        return [direction] if direction else []
    parts: list[Direction] = [{}, {}]
    for name, tensor in direction.items():
        parts[name in apart][name] = tensor
    return [part for part in parts if part]


def _are_same(known: Sequence[object], found: Sequence[object]) -> bool:
    """Return whether two lists have the same objects."""
    return len(known) == len(found) and all(map(is_, known, found))


def _stacks(
    layers: Mapping[str, RunningFactors],
    gradient: Direction,
    inverses: Mapping[str, Inverted] | None,
) -> Stacks:
    """Return what is preconditioned together; see `Preconditioning.applied`."""
    found: dict[Hashable, list[AtHand]] = defaultdict(list)
    for layer, inverse in _at_hand(layers, gradient, inverses):
        found[_form(layer, inverse, gradient)].append((layer, inverse))
    return list(found.values())


def _at_hand(
    layers: Mapping[str, RunningFactors],
    gradient: Direction,
    inverses: Mapping[str, Inverted] | None,
) -> Iterator[AtHand]:
    """Yield the layers whose weights have gradients and that have an inverse, with it."""
    for name, running in layers.items():
        inverse, own = running.inverse, gradient.get(running.layer.layout.weight)
        if inverses is not None:
            inverse = inverses[name].inverse if name in inverses else None
        if inverse is not None and own is not None:
            yield running.layer, running.on_device(inverse, own.device)


def _form(layer: Layer, inverse: LayerInverse, gradient: Direction) -> Hashable:
    """Return what layers share that are preconditioned together, or a layer's name."""
    layout, form = layer.layout, inverse.form
    _, rows, columns = layout.shape
    is_small = max(rows, columns) <= LARGEST_BATCHED_DIMENSION
    if form is None or not is_small or not gradient.keys() >= set(layout.parameters):
        return layer.name
    own = [(gradient[name].dtype, gradient[name].device) for name in layout.parameters]
    return form, rows, columns, *own


def _applied(layers: Sequence[AtHand], gradient: Direction) -> Direction:
    """Return the preconditioned gradient of a layer's parameters."""
    ((layer, inverse),) = layers
    if not gradient.keys() >= set(layer.layout.parameters):
        gradient = {**layer.zeros(), **gradient}
    return _precise(mapped_matrices(layer.layout, gradient, inverse.apply), gradient)


def _applied_together(layers: Sequence[AtHand], gradient: Direction) -> Direction:
    """Return the preconditioned gradients of several layers of one form."""
    layouts = [layer.layout for layer, _ in layers]
    (_, first), *others = layers
    rows = joined_matrices(layouts, gradient)
    found = first.joined([inverse for _, inverse in others]).apply(rows)
    return _precise(divided_matrices(layouts, found), gradient)


def _precise(direction: Direction, gradient: Direction) -> Direction:
    """Return a direction in the data type of steps for its gradients."""
    dtype = reduce(torch.promote_types, [gradient[name].dtype for name in direction], torch.float32)
    if all(tensor.dtype == dtype for tensor in direction.values()):
        return direction
    return {name: tensor.to(dtype) for name, tensor in direction.items()}
