"""The numbers of examples whose loss depends on a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from einconv_kfac.curvature.estimation.evaluation import Evaluation
from einconv_kfac.distributed.summable import SumPart


class Counted(Protocol):
    """Sums over examples that are counted."""

    @property
    def examples(self) -> int:
        """The number of examples so far."""


class Participation:
    """How many examples of several batches there are, and how many in batches that use a layer.

    An expert that no example of a batch was sent to, or a branch that was not taken, adds nothing
    to the curvature of a mean over all examples. Averages over the batches that use the layer are
    multiplied by its share of the examples.

    Args:
        layers: The layers' names.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._total = 0
        self._examples = dict.fromkeys(layers, 0)

    def add_(
        self, moments: Mapping[str, Counted], before: Mapping[str, int], evaluation: Evaluation
    ) -> None:
        """Count the examples of one batch.

        Args:
            moments: By layer name, after the batch was added.
            before: Their numbers of examples before.
            evaluation: The loss on the batch.
        """
        used = [name for name, own in moments.items() if own.examples > before[name]]
        if not used and evaluation.is_empty:
            return
        self._total += evaluation.examples
        for name in used:
            self._examples[name] += evaluation.examples

    def share(self, layer: str) -> float:
        """Return the share of a layer: 1 if all batches use it."""
        own = self._examples[layer]
        return own / self._total if own < self._total else 1.0

    def parts(self) -> list[SumPart]:
        """See `Summable`."""
        return []

    def counts(self) -> list[int]:
        """See `Summable`."""
        return [self._total, *self._examples.values()]

    def set_counts_(self, counts: Sequence[int]) -> None:
        """See `Summable`."""
        self._total, *examples = counts
        self._examples = dict(zip(self._examples, examples))
