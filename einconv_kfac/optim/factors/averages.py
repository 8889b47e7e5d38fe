"""Running averages of the factors of many layers, moved by multi-tensor operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import Pair
from einconv_kfac.curvature.estimation.moments import averaged
from einconv_kfac.optim.factors.accumulator import LayerSums
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.registry import is_whole
from einconv_kfac.optim.moving_average import bias_corrected_weight


@dataclass(frozen=True)
class Contribution:
    """What the batches of a step contribute to a layer's averages.

    Args:
        running: The averages.
        moments: The contribution.
        decay: Decay of the averages.
        scale: Factor of the averages over the batches.
        weight: Another one, on the device; 1 for ``None``.
    """

    running: RunningFactors
    moments: LayerSums
    decay: float
    scale: float = 1.0
    weight: Tensor | None = None


def move_averages_(contributions: Sequence[Contribution], step: int) -> None:
    """Move the bias-corrected running averages of layers, into the memory of new factors.

    The previous averages are left as they are, for a step that fails.

    Args:
        contributions: What is averaged, by layer.
        step: The step.
    """
    present = [own for own in contributions if own.running.is_owned]
    found = averaged([own.moments for own in present])
    weights = [own.weight for own in present]
    _scale_([b for _, b in found], [own.scale for own in present], weights)
    _move_(present, found)
    _measure_([own.running for own in contributions])
    for own in contributions:
        if not own.running.is_owned:
            own.running.updated_elsewhere_()
        if own.moments.squares is not None:
            total: Any = own.scale if own.weight is None else own.weight * own.scale
            squares = own.moments.squares.block(total)
            own.running.correct_(squares.values, own.decay)
        own.running.factor_step, own.running.rows = step, own.moments.rows
        own.running.factor_seconds = own.moments.seconds


def _measure_(layers: Sequence[RunningFactors]) -> None:
    """Set the stretch of layers that compute their weights; the host waits for a device once."""
    known = [(own, weight.stretch()) for own in layers if (weight := own.layer.computed)]
    if known:
        first = known[0][1]
        numbers = torch.stack([stretch.to(first).double() for _, stretch in known]).tolist()
        for (running, _), number in zip(known, numbers):
            running.stretch = number


def _scale_(factors: list[Tensor], scales: list[float], weights: Sequence[Tensor | None]) -> None:
    """Multiply each factor by its number and by its weight."""
    if any(scale != 1 for scale in scales):
        torch._foreach_mul_(factors, scales)
    alike: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for factor, weight in zip(factors, weights):
        if weight is not None:
            alike.setdefault(id(weight), (weight, []))[1].append(factor)
    for weight, own in alike.values():
        torch._foreach_mul_(own, weight.to(own[0]))


def _move_(contributions: Sequence[Contribution], factors: Sequence[Pair]) -> None:
    """Move the averages towards new factors."""
    moved: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for own, (a, b) in zip(contributions, factors):
        running, new = own.running, (_own(a), _own(b))
        running.updates += 1
        if running.factors is not None:
            moved[bias_corrected_weight(own.decay, running.updates)] += zip(new, running.factors)
        running.factors = new
    for weight, pairs in moved.items():
        present = [new for new, _ in pairs]
        torch._foreach_lerp_(present, [old.to(new) for new, old in pairs], 1 - weight)


def _own(factor: Tensor) -> Tensor:
    """Return a factor as a tensor that is a view of nothing."""
    return factor if is_whole(factor) else factor.clone()
