"""The curvature of a loss with respect to the model's output.

A loss of ``N`` examples is ``L = sum_j c_j l_j``: independent terms ``l_j`` (one per example,
pixel, token or output entry) with weights ``c_j`` that contain the mean or the sum, class
weights and ignored targets. A rule returns *root vectors* ``s``, shaped like the output, with
``sum_v s_v s_v^T`` equal to the Hessian of ``L`` with respect to the output, exactly or in
expectation. Exact root vectors touch one term of each example, so that examples do not mix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Generator, Tensor, nn


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
    link: Callable[[Tensor], Tensor] = _identity


class TorchLossRule(ABC):
    """A `LossRule` for losses of torch, in a file of its own in ``losses/rules/``.

    Attributes:
        kinds: The types of losses that the rule applies to, with their subclasses.
        examples: Losses on which the tests compare the rule with automatic differentiation.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    examples: ClassVar[tuple[LossExample, ...]]

    @abstractmethod
    def roots(self, loss: Any, output: Tensor, target: Any) -> Iterator[Tensor]:
        """See `LossRule`."""

    @abstractmethod
    def sample(self, loss: Any, output: Tensor, target: Any, generator: Generator) -> Tensor:
        """See `LossRule`."""
