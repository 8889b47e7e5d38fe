"""The nodes of a tensor network: an operand with the names of its indices, and edits of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from einconv_kfac.network.operand import Leaf, Operand
from einconv_kfac.network.step import Step

Steps = Callable[[int], tuple[Step, ...]]
"""The steps for a tensor, given the dimension at which they start."""


@dataclass(frozen=True)
class Node:
    """An operand and the names of its indices.

    Raises:
        ValueError: If the number of indices is not the operand's number of dimensions.
    """

    operand: Operand
    indices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.operand.shape) != len(self.indices):
            raise ValueError(
                f"`indices` must name the {len(self.operand.shape)} dimensions of "
                f"{self.operand.name}, got {self.indices}."
            )


@dataclass(frozen=True)
class Edit:
    """The replacement of adjacent indices by others, with the steps that it takes on a tensor.

    Args:
        old: Adjacent indices; a leaf has all of them or none.
        new: The indices that replace them.
        steps: Steps for a leaf, given the dimension of the first old index.
        undo: Steps from the new indices of the contraction's result back to the old ones,
            given the dimension of the first of them.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    steps: Steps
    undo: Steps

    def apply(self, node: Node) -> Node:
        """Return the node after the edit; only leaves that have the old indices change."""
        if not isinstance(node.operand, Leaf) or self.old[0] not in node.indices:
            return node
        dim = node.indices.index(self.old[0])
        return Node(node.operand.then(*self.steps(dim)), self.indices(node.indices, dim))

    def indices(self, indices: tuple[str, ...], dim: int) -> tuple[str, ...]:
        """Return the indices with the old ones, which start at ``dim``, replaced."""
        return (*indices[:dim], *self.new, *indices[dim + len(self.old) :])
