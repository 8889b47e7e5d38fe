"""What is known of the nonlinear operations between a model's outputs and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from einconv_kfac.curvature.objective.local_curvature import LocalCurvature

Function: TypeAlias = Callable[..., Tensor]
"""Returns the output of an operation for its inputs."""


@dataclass(frozen=True)
class NodeRule(ABC):
    """Describes one kind of nonlinear node of the autograd graph, from what the node saves.

    Args:
        kind: Name of the operation, as `kind_of_node` returns it.
        output: The index of the output that is described; others have no derivative.
    """

    kind: str
    output: int = field(default=0, kw_only=True)

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """Return whether the operation is linear in those inputs that depend on the model."""
        return False

    @abstractmethod
    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """Return the inputs in the recorded pass; ``None`` for those that cannot be found."""

    @abstractmethod
    def function(self, node: Any) -> Function | None:
        """Return the operation as a function of its inputs; it must not refer to the node.

        ``None`` if the node does not save enough.
        """

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """Return the curvature of ``<weight, output>`` by the first input.

        ``None`` stands for a matrix that vanishes, is not positive semi-definite, or is not known.

        Args:
            node: The node.
            inputs: The inputs in the recorded pass.
            weight: The derivative of the loss by the output, shaped like it.
        """
        return None
