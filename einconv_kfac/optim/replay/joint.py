"""Losses of several batches as one, where they depend on the same calls of the model.

A recurrent loop may add a loss in every step, and a model with several heads has a loss for each.
Their calls are replayed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.loss_model import Expansion, LossModel
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.versions import Versions
from einconv_kfac.optim.vectors import sum_of


@dataclass(frozen=True)
class Part:
    """A loss of a sum.

    Args:
        model: The loss.
        weight: Its weight in the sum.
        sources: Which of the sum's outputs, and parameters after them, it depends on.
    """

    model: LossModel
    weight: Tensor
    sources: tuple[int, ...]


@dataclass(frozen=True)
class JointLoss:
    """A weighted sum of losses.

    Args:
        parts: The losses.
        count: The number of outputs and parameters that they depend on together.
    """

    parts: tuple[Part, ...]
    count: int

    def value(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        values = [p.weight * p.model.value([outputs[i] for i in p.sources]) for p in self.parts]
        return sum_of([value.double() for value in values])

    def slopes(self) -> Sequence[Tensor | None]:
        """See `LossModel`."""
        found: list[Tensor | None] = [None] * self.count
        for part in self.parts:
            for index, slope in zip(part.sources, part.model.slopes()):
                if slope is not None:
                    own, known = part.weight * slope, found[index]
                    found[index] = own if known is None else known + own
        return found

    def expansion(self, tangents: Sequence[Sequence[Tensor | None]]) -> Expansion:
        """See `LossModel`."""
        found = [
            (p.weight.double(), p.model.expansion([[t[i] for i in p.sources] for t in tangents]))
            for p in self.parts
        ]
        slope = sum_of([weight * each.slope for weight, each in found])
        return Expansion(slope, sum_of([weight * each.curvature for weight, each in found]))

    def at(self, outputs: Sequence[Tensor]) -> JointLoss:
        """See `LossModel`."""
        size = len(outputs)
        parts = (
            replace(p, model=p.model.at([outputs[i] for i in p.sources if i < size]))
            for p in self.parts
        )
        return JointLoss(tuple(parts), self.count)

    def precision(self) -> torch.dtype:
        """See `LossModel`; the least of the parts."""
        return max((p.model.precision() for p in self.parts), key=lambda own: torch.finfo(own).eps)

    @property
    def has_policies(self) -> bool:
        """See `LossModel`."""
        return any(part.model.has_policies for part in self.parts)

    def divergence(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        return sum_of([p.model.divergence([outputs[i] for i in p.sources]) for p in self.parts])

    def unknown(self) -> Sequence[str]:
        """See `LossModel`."""
        return sorted({kind for part in self.parts for kind in part.model.unknown()})


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """Return batches, of which those that depend on the same calls are one.

    Args:
        batches: Batches that can be replayed.
    """
    if len(batches) == 1:
        return list(batches)
    groups: list[tuple[set[int], list[Batch]]] = []
    for batch in batches:
        numbers = {forward.number for forward in batch.forwards}
        own = [group for group in groups if batch.subset is None and group[0] & numbers]
        merged = [*(b for _, members in own for b in members), batch]
        groups = [group for group in groups if group not in own]
        groups.append((numbers.union(*(known for known, _ in own)), merged))
    return [_joint(members) if len(members) > 1 else members[0] for _, members in groups]


def _joint(batches: Sequence[Batch]) -> Batch:
    """Return several batches as one with the weight 1."""
    calls: dict[int, ForwardPass] = {}
    for forward in (each for batch in batches for each in batch.forwards):
        known = calls.get(forward.number, forward)
        calls[forward.number] = replace(
            known,
            inputs=tuple(dict.fromkeys((*known.inputs, *forward.inputs))),
            passed=tuple(dict.fromkeys((*known.passed, *forward.passed))),
        )
    forwards = tuple(each for _, each in sorted(calls.items()))
    parameters = tuple(dict.fromkeys(name for batch in batches for name in batch.parameters))
    values = {key: o for batch in batches for key, o in zip(_keys(batch.forwards), batch.outputs)}
    order = [*_keys(forwards), *parameters]
    places = {key: index for index, key in enumerate(order)}
    parts: list[Part] = []
    for batch in batches:
        assert batch.loss_model is not None
        keys = [*_keys(batch.forwards), *batch.parameters]
        parts.append(Part(batch.loss_model, batch.weight, tuple(places[key] for key in keys)))
    return Batch(
        forwards,
        tuple(values[key] for key in _keys(forwards)),
        parameters,
        JointLoss(tuple(parts), len(order)),
        sum_of([(batch.weight * batch.loss).double() for batch in batches]),
        torch.ones_like(batches[0].weight),
        Versions(()),
        has_moved=any(batch.has_moved for batch in batches),
        is_assumed=all(batch.is_assumed for batch in batches),
    )


def _keys(forwards: Sequence[ForwardPass]) -> Iterator[object]:
    """Yield what identifies each tensor of passes that losses depend on, in order."""
    for forward in forwards:
        for source in forward.inputs:
            yield forward.number, source
