"""A loss whose weight is in its root vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.evaluation import Evaluation, Root


@dataclass(frozen=True)
class WeightedEvaluation:
    """An evaluation whose vectors are multiplied by the square root of a weight.

    The device multiplies, so that the host does not wait for the weight.

    Args:
        evaluation: The evaluation.
        root: The square root of the weight.
    """

    evaluation: Evaluation
    root: Tensor

    @property
    def heads(self) -> Sequence[Tensor | GradientEdge]:
        """See `Evaluation`."""
        return self.evaluation.heads

    @property
    def outputs(self) -> Sequence[Tensor | GradientEdge]:
        """See `Evaluation`."""
        return self.evaluation.outputs

    @property
    def loss(self) -> Tensor | GradientEdge:
        """See `Evaluation`."""
        return self.evaluation.loss

    @property
    def weight(self) -> Tensor:
        """See `Evaluation`."""
        return self._times_root(self.evaluation.weight)

    @property
    def examples(self) -> int:
        """See `Evaluation`."""
        return self.evaluation.examples

    @property
    def is_empty(self) -> bool:
        """See `Evaluation`."""
        return self.evaluation.is_empty

    @property
    def shows_emptiness(self) -> bool:
        """See `Evaluation`."""
        return self.evaluation.shows_emptiness

    @property
    def takes_unbatched(self) -> bool:
        """See `Evaluation`."""
        return self.evaluation.takes_unbatched

    def like_outputs(self) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return self.evaluation.like_outputs()

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return [self._times_root(own) for own in self.evaluation.sample(generator)]

    def samples(self, generator: Generator) -> Iterator[Sequence[Tensor]]:
        """See `Evaluation`."""
        for found in self.evaluation.samples(generator):
            yield [self._times_root(own) for own in found]

    def roots(self) -> Iterator[Root]:
        """See `Evaluation`."""
        for vectors, is_alone in self.evaluation.roots():
            yield Root([self._times_root(own) for own in vectors], is_alone)

    def _times_root(self, vector: Tensor) -> Tensor:
        """Return a vector times the square root of the weight, in its data type."""
        return vector * self.root.to(vector)
