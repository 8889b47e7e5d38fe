"""The curvature of a loss with respect to the model's output.

A loss of ``N`` examples is ``L = sum_j c_j l_j``: independent terms ``l_j`` (one per example,
pixel, token or output entry) with weights ``c_j`` that contain the mean or the sum, class
weights and ignored targets. A rule returns *root vectors* ``s``, shaped like the output, with
``sum_v s_v s_v^T`` equal to the Hessian of ``L`` with respect to the output, exactly or in
expectation. Exact root vectors touch one term of each example, so that examples do not mix.

For a likelihood of probabilities or log-probabilities the Fisher information takes the place of
the Hessian: with the map from scores to probabilities it gives the Hessian by the scores
(Martens, 2020).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Generator, Tensor, nn

Link: TypeAlias = Callable[[Tensor], Tensor]
"""Maps scores to the output that a loss takes."""


class LossRule(Protocol):
    """Describes the curvature of one type of loss."""

    def roots(self, loss: Any, output: Tensor, target: Any) -> Iterator[Tensor]:
        """Yield root vectors ``[n, *f]`` that reproduce the Hessian at ``output [n, *f]``.

        A root vector holds one vector per example; examples do not mix.
        """

    def sample(self, loss: Any, output: Tensor, target: Any, generator: Generator) -> Tensor:
        """Draw a root vector ``[n, *f]`` whose second moment is the Hessian.

        The global random state must not change.
        """


class WeightedLossRule(Protocol):
    """A `LossRule` that also takes a weight for each entry of the unreduced loss.

    The curvature is then that of ``sum_j weights[j] * l[j]``, where ``l`` is what the loss
    returns for ``reduction="none"``. The weights replace the reduction. They have the shape of
    ``l``: ``[n, *d]`` for scores of classes ``[n, c, *d]``, ``[n, *f]`` for a loss of single
    entries. None may be negative.
    """

    def roots(
        self, loss: Any, output: Tensor, target: Any, weights: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See `LossRule`."""

    def sample(
        self,
        loss: Any,
        output: Tensor,
        target: Any,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """See `LossRule`."""


def _identity(scores: Tensor) -> Tensor:
    """Return the scores."""
    return scores


@dataclass(frozen=True)
class LossExample:
    """A loss that a rule covers, and a batch for it.

    Args:
        build: Returns the loss, given its ``reduction``.
        batch: Draws scores ``[n, *f]`` and targets.
        link: Maps scores to the output that the loss takes. The Hessian of the loss by the
            scores equals the Gauss-Newton matrix that the root vectors at the output give.
    """

    build: Callable[..., nn.Module]
    batch: Callable[[Generator], tuple[Tensor, Any]]
    link: Link = _identity


class TorchLossRule(ABC):
    """A `WeightedLossRule` for losses of torch, in a file of its own in ``losses/rules/``.

    Attributes:
        kinds: The types of losses that the rule applies to, with their subclasses.
        examples: Losses on which the tests compare the rule with automatic differentiation.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    examples: ClassVar[tuple[LossExample, ...]]

    @abstractmethod
    def roots(
        self, loss: Any, output: Tensor, target: Any, weights: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See `WeightedLossRule`."""

    @abstractmethod
    def sample(
        self,
        loss: Any,
        output: Tensor,
        target: Any,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """See `WeightedLossRule`."""

    def samples(
        self, loss: Any, output: Tensor, target: Any, generator: Generator
    ) -> Iterator[Tensor]:
        """Yield what calls of `sample`, one after the other, return; without end."""
        while True:
            yield self.sample(loss, output, target, generator)

    def closed_product(self, loss: Any, output: Tensor, target: Any, v: Tensor) -> Tensor | None:
        """Return the curvature times ``v [n, *f]``, or ``None`` for the Hessian by autograd."""
        return None

    def fault(self, loss: Any) -> str | None:
        """Return why the options of a loss leave it without curvature, or ``None``."""
        return None

    def is_own(self, loss: nn.Module) -> bool:
        """Return whether the loss is torch's own, not a subclass that takes other targets."""
        return type(loss) in self.kinds or type(loss).forward in {k.forward for k in self.kinds}

    def divisor(self, loss: Any, output: Tensor, target: Any) -> Tensor | int:
        """Return what a mean divides the sum of the terms by; zero if no target counts."""
        return output.numel()

    def canonical(self, loss: Any, output: Tensor, target: Any) -> tuple[Tensor, Link]:
        """Return scores and the link to ``output`` for which the curvature is a Hessian.

        The Hessian of the loss by the scores is the Gauss-Newton matrix of the link and of the
        curvature at the output.
        """
        return output, _identity
