"""What is known of the nonlinear operations between a model's outputs and a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from einconv_kfac.curvature.objective.local_curvature import LocalCurvature

Function: TypeAlias = Callable[..., Tensor]
"""Returns the output of an operation for its inputs."""


class NodeRule(Protocol):
    """Describes one kind of nonlinear node of the autograd graph, from what the node saves."""

    @property
    def kind(self) -> str:
        """Name of the operation, as `kind_of_node` returns it."""

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """Return whether the operation is linear in those inputs that depend on the model."""

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """Return the inputs in the recorded pass; ``None`` for those that cannot be found."""

    def function(self, node: Any) -> Function | None:
        """Return the operation as a function of its inputs; it must not refer to the node.

        ``None`` if the node does not save enough.
        """

    def curvature(
        self, node: Any, inputs: Sequence[Tensor | None], weight: Tensor
    ) -> LocalCurvature | None:
        """Return the curvature of ``<weight, output>`` by the first input.

        ``None`` stands for a matrix that vanishes or is not positive semi-definite.

        Args:
            node: The node.
            inputs: The inputs in the recorded pass.
            weight: The derivative of the loss by the output, shaped like it.
        """
