"""The relative change of the outputs of layers by an update of their parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.batching import LARGEST_BATCHED_DIMENSION
from einconv_kfac.curvature.blocks.diagonal_factor import (
    diagonal_of,
    is_diagonal,
    times_on_right,
)
from einconv_kfac.curvature.blocks.matrix_layout import joined_matrices
from einconv_kfac.curvature.devices.products import product
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.vectors import Direction

Stacks = Sequence[Sequence[RunningFactors]]
"""Layers that are treated together."""
SMALL_FRACTION = 0.3
"""Outputs of a layer, relative to those of weights as torch draws them, that count as small."""
PANEL = 512
"""Columns of a large factor that are multiplied at once, with the rows from their first one on.
What the rows above contribute follows by symmetry."""


@dataclass(frozen=True)
class _Known:
    """What was computed for layers from tensors, as long as these do not change.

    Args:
        stacks: The layers by name.
        tensors: The tensors.
        versions: The versions of these.
        numbers: What was computed, ``[layers]``.
    """

    stacks: list[list[str]]
    tensors: list[Tensor]
    versions: list[int]
    numbers: Tensor

    @staticmethod
    def of(
        known: _Known | None, stacks: Stacks, tensors: list[Tensor], compute: Callable[[], Tensor]
    ) -> _Known:
        """Return what is known if it holds for layers and tensors, or else compute it."""
        names = [[running.layer.name for running in stack] for stack in stacks]
        versions = [tensor._version for tensor in tensors]
        is_known = known is not None and (known.stacks, known.versions) == (names, versions)
        if known is not None and is_known and all(map(is_, known.tensors, tensors)):
            return known
        return _Known(names, tensors, versions, compute())


class OutputChange:
    """Computes the relative change of the outputs of layers.

    Args:
        layers: The layers, by name; others may come.

    Attributes:
        present: What the parameters of the present step contribute, once that is known; several
            updates of a step share it.
        small: What counts as small by the present factors, which several steps share.
    """

    def __init__(self, layers: Mapping[str, RunningFactors]) -> None:
        self._layers = layers
        self.present: _Known | None = None
        self.small: _Known | None = None

    def of(self, update: Direction, parameters: Direction) -> Tensor:
        """Return ``sqrt(tr(U A U^T) / tr(W A W^T))``, summed over layers, in float64.

        ``U`` is the update of the parameters ``W`` of a layer and ``A`` its running input factor. A
        layer whose output is zero does not count: nothing is small relative to that, and a layer
        that starts at zero, as heads and residual branches often do, could never leave it. One
        that starts near zero could double its output in a step at most, and would hold up all
        others. So it counts in proportion to ``tr(W A W^T)``, as far as this is below
        `SMALL_FRACTION` squared of its mean for weights of variance ``1 / (3 inputs)``, which is
        how torch draws them. Layers without factors do not count.

        Args:
            update: The update, by parameter name; zero for those that it lacks.
            parameters: The parameters, by name.
        """
        update, parameters = self._of_weights(update, parameters)
        alike: dict[Hashable, list[RunningFactors]] = defaultdict(list)
        for running in self._layers.values():
            if running.factors is not None:
                alike[_form(running, update, parameters)].append(running)
        if not (stacks := [*alike.values()]):
            return torch.zeros((), dtype=torch.float64)
        return (_squares(stacks, update) / self._divisors(stacks, parameters)).sqrt().sum()

    def _of_weights(self, update: Direction, parameters: Direction) -> tuple[Direction, Direction]:
        """Return an update and parameters with computed weights, by their names in layouts."""
        for layer in (running.layer for running in self._layers.values()):
            if layer.computed is not None and layer.weight in parameters:
                values, changes = layer.effective(parameters, update)
                update, parameters = {**update, **changes}, {**parameters, **values}
        return update, parameters

    def _divisors(self, stacks: Stacks, parameters: Direction) -> Tensor:
        """Return what squares of an update are divided by, ``[layers]``; infinite for zero."""
        factors = [*_factors(stacks)]

        def divisors() -> Tensor:
            self.small = _Known.of(self.small, stacks, factors, partial(_squares_of_small, stacks))
            squares = _squares(stacks, parameters)
            return torch.maximum(squares, self.small.numbers / squares)

        tensors = [*factors, *_parameters(stacks, parameters)]
        self.present = _Known.of(self.present, stacks, tensors, divisors)
        return self.present.numbers


def _factors(stacks: Stacks) -> Iterator[Tensor]:
    """Yield the input factors of layers."""
    for running in (each for stack in stacks for each in stack):
        if running.factors is not None:
            yield running.factors[0]


def _parameters(stacks: Stacks, parameters: Direction) -> Iterator[Tensor]:
    """Yield the parameters of layers."""
    for running in (each for stack in stacks for each in stack):
        yield from (
            parameters[name] for name in running.layer.layout.parameters if name in parameters
        )


def _form(running: RunningFactors, *directions: Direction) -> Hashable:
    """Return what layers share that are treated together, or a layer's name."""
    assert running.factors is not None
    layout, (a, _) = running.layer.layout, running.factors
    groups, rows, columns = layout.shape
    is_whole = all(name in own for name in layout.parameters for own in directions)
    if max(rows, columns) > LARGEST_BATCHED_DIMENSION or not is_whole:
        return running.layer.name
    own = [(own[name].dtype, own[name].device) for own in directions for name in layout.parameters]
    return groups, rows, columns, a.shape, a.dtype, *own


def _squares(stacks: Stacks, values: Direction) -> Tensor:
    """Return ``tr(V A V^T)`` of all layers, ``[layers]``, in float64."""
    return torch.cat([_squares_together(stack, values) for stack in stacks]).double()


def _squares_together(stack: Sequence[RunningFactors], values: Direction) -> Tensor:
    """Return ``tr(V A V^T)`` of layers that are treated together, ``[layers]``."""
    layers = [running.layer for running in stack]
    if len(layers) == 1 and not all(name in values for name in layers[0].layout.parameters):
        known = {name: values[name] for name in layers[0].layout.parameters if name in values}
        values = {**layers[0].zeros(), **known}
    rows = joined_matrices([layer.layout for layer in layers], values)
    a = _joined([*_factors([stack])])
    rows = rows.to(a.dtype)
    if len(layers) == 1:
        return _square(rows, a).unsqueeze(0)
    return (times_on_right(rows, a, product) * rows).reshape(len(layers), -1).sum(-1)


def _squares_of_small(stacks: Stacks) -> Tensor:
    """Return the square of the ``tr(W A W^T)`` up to which outputs count as small, ``[layers]``."""
    traces = [diagonal_of(a).sum(dtype=torch.float64) for a in _factors(stacks)]
    shapes = [running.layer.layout.shape for stack in stacks for running in stack]
    shares = [SMALL_FRACTION**2 * rows / (3 * inputs) for _, rows, inputs in shapes]
    small = torch.stack(torch._foreach_mul(traces, shares))
    return small.square_().clamp_min_(torch.finfo(torch.float64).tiny)


def _square(rows: Tensor, a: Tensor) -> Tensor:
    """Return ``tr(V A V^T)`` of one layer."""
    size = a.shape[-1]
    if is_diagonal(a) or size < 2 * PANEL:
        return torch.dot(times_on_right(rows, a, product).flatten(), rows.flatten())
    total = rows.new_zeros(())
    for start in range(0, size, PANEL):
        end = min(start + PANEL, size)
        own = rows[..., start:end]
        moved = product(own, a[..., start:end, start:end])
        if end < size:  # the panel below the diagonal block counts twice
            moved = moved + 2 * product(rows[..., end:], a[..., end:, start:end])
        total = total + (moved * own).sum()
    return total


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """Return factors of one shape as one, group after group."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))
