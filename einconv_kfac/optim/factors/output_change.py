"""The relative change of the outputs of layers by an update of their parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.batching import LARGEST_BATCHED_DIMENSION
from einconv_kfac.curvature.blocks.diagonal_factor import times_on_right
from einconv_kfac.curvature.blocks.matrix_layout import joined_matrices
from einconv_kfac.curvature.devices.products import product
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.vectors import Direction


def relative_change(
    layers: Iterable[RunningFactors], update: Direction, parameters: Direction
) -> Tensor:
    """Return ``sqrt(tr(U A U^T) / tr(W A W^T))``, summed over layers, in float64.

    ``U`` is the update of the parameters ``W`` of a layer and ``A`` its running input factor. A
    layer whose output is zero does not count: nothing is small relative to that, and a layer that
    starts at zero, as heads and residual branches often do, could never leave it.

    Args:
        layers: The layers; those without factors do not count.
        update: The update, by parameter name; zero for those that it lacks.
        parameters: The parameters, by name.
    """
    stacks: dict[Hashable, list[RunningFactors]] = defaultdict(list)
    for running in layers:
        if running.factors is not None:
            stacks[_form(running, update, parameters)].append(running)
    if not stacks:
        return torch.zeros((), dtype=torch.float64)
    pairs = [
        [_squares(stack, values) for values in (update, parameters)] for stack in stacks.values()
    ]
    moved, present = (torch.cat(own).double() for own in zip(*pairs))
    return torch.where(present > 0, moved / present, 0.0).sqrt().sum()


def _form(running: RunningFactors, *directions: Direction) -> Hashable:
    """Return what layers share that are treated together, or a layer's name."""
    assert running.factors is not None
    layer, (a, _) = running.layer, running.factors
    groups, rows, columns = layer.layout.shape
    is_whole = all(name in own for name in layer.parameters for own in directions)
    if max(rows, columns) > LARGEST_BATCHED_DIMENSION or not is_whole:
        return layer.name
    own = [(own[name].dtype, own[name].device) for own in directions for name in layer.parameters]
    return groups, rows, columns, a.shape, a.dtype, *own


def _squares(stack: Sequence[RunningFactors], values: Direction) -> Tensor:
    """Return ``tr(V A V^T)`` of layers that are treated together, ``[layers]``."""
    layers = [running.layer for running in stack]
    if len(layers) == 1 and not all(name in values for name in layers[0].parameters):
        known = {name: values[name] for name in layers[0].parameters if name in values}
        values = {**layers[0].zeros(), **known}
    rows = joined_matrices([layer.layout for layer in layers], values)
    a = _joined([running.factors[0] for running in stack if running.factors is not None])
    rows = rows.to(a.dtype)
    moved = times_on_right(rows, a, product)
    if len(layers) == 1:
        return torch.dot(moved.flatten(), rows.flatten()).unsqueeze(0)
    return (moved * rows).reshape(len(layers), -1).sum(-1)


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """Return factors of one shape as one, group after group."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))
