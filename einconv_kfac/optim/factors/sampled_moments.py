"""Factors from some of a batch's examples, as Martens and Grosse (2015, section 8) have them.

The examples that enter ``A`` and ``B`` are drawn at random, one set for all layers. Sums over
them are scaled to the whole batch, so that several batches keep their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Generator, Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.factor_sums import batch_size
from einconv_kfac.curvature.estimation.moments import LayerMoments, Moments
from einconv_kfac.optim.replay.subsample import random_rows

Rows = Callable[[int], Tensor]
"""Returns the chosen examples' numbers ``[k]``, given the number ``n`` of all."""


class SampledMoments:
    """Adds some of the examples of one batch to a layer's moments, in place of all.

    Args:
        moments: The layer's moments.
        rows: Chooses the examples.
    """

    def __init__(self, moments: LayerMoments, rows: Rows) -> None:
        self._moments = moments
        self._rows = rows

    @property
    def needs_examples(self) -> bool:
        """See `Moments`."""
        return True

    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """See `Moments`."""
        size = batch_size(self._moments.layer, calls) if examples is None else examples
        self._moments.add_inputs_(self._chosen(calls), size, weight)

    def snapshot(self) -> Callable[[], None]:
        """See `Moments`."""
        return self._moments.snapshot()

    def add_gradients_(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor],
        scale: float,
        are_alone: Sequence[bool] = (),
    ) -> None:
        """See `Moments`; terms of several examples are those of the chosen ones."""
        rows = self._rows(size := calls[0].x.shape[0])
        chosen = [_by_root(own, size)[:, rows].flatten(0, 1) for own in gradients]
        own = self._chosen(calls), chosen, scale * size / len(rows)
        self._moments.add_gradients_(*own, are_alone)

    def add_examples_(self, examples: int) -> None:
        """See `Moments`."""
        self._moments.add_examples_(examples)

    def add_weight_gradient_(self, gradient: Tensor, scale: float) -> None:
        """See `Moments`; nothing is sampled, since it takes no product over examples."""
        self._moments.add_weight_gradient_(gradient, scale)

    def _chosen(self, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Return calls with the inputs of the chosen examples."""
        return [replace(call, x=call.x[self._rows(call.x.shape[0])]) for call in calls]


def _by_root(gradient: Tensor, size: int) -> Tensor:
    """Return gradients ``[v n, ...]`` of ``n`` examples as ``[v, n, ...]``."""
    return gradient.reshape(len(gradient) // size, size, *gradient.shape[1:])


def sampled(
    moments: Mapping[str, LayerMoments], part: float, generator: Generator
) -> dict[str, Moments]:
    """Return what adds a random part of the examples of one batch to moments.

    Args:
        moments: By layer name.
        part: The fraction of the examples, rounded up.
        generator: Draws them.
    """
    drawn: dict[int, Tensor] = {}

    def rows(size: int) -> Tensor:
        if size not in drawn:
            drawn[size] = random_rows(size, part, generator)
        return drawn[size]

    return {name: SampledMoments(own, rows) for name, own in moments.items()}
