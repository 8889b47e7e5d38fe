"""Operations in place on a part of a tensor, as by ``out[:, 0] = 0``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from einconv_kfac.curvature.objective.graph import inputs_of, kind_of_node, zeros_at

# fmt: off
_VIEWS = frozenset(
    (
        "Alias", "AsStrided", "Clone", "Copy", "CopySlices", "Expand", "Permute", "ReshapeAlias",
        "Select", "Slice", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
)
# fmt: on
"""What a gradient passes through where values are assigned or shifted."""


_SCALES = ("Mul", "Div", "Neg")
"""What it passes through where values are scaled."""


class GradientGraph:
    """The graph of the gradient of an operation in place, which tells what the operation is.

    Args:
        node: A node of the kind ``CopySlices``, which does not tell it.

    Attributes:
        nodes: The nodes of the gradient's own operations.
        is_constant: Whether the gradient does not depend on what the operation is applied to, so
            far as a derivative shows it.
        strides: The strides of the tensor of which a part is changed.
    """

    def __init__(self, node: Any) -> None:
        self.nodes: set[Any] = set()
        self.is_constant = True
        with torch.enable_grad():
            results = node(zeros_at((node, 0)).requires_grad_())
        several = results if isinstance(results, tuple) else (results,)
        self.strides = next((each.stride() for each in several if each is not None), ())
        before = {node, *(edge[0] for edge in inputs_of(node) if edge is not None)}
        waiting = [each.grad_fn for each in several if each is not None and each.requires_grad]
        while waiting:
            own = waiting.pop()
            if own in before:
                self.is_constant = False
            elif own is not None and own not in self.nodes:
                self.nodes.add(own)
                waiting += [parent for parent, _ in own.next_functions]

    def of_kinds(self, kinds: Collection[str]) -> list[Any]:
        """Return the nodes of some kinds."""
        return [each for each in self.nodes if kind_of_node(each) in kinds]

    def part(self) -> tuple[Sequence[int], Sequence[int], int] | None:
        """Return size, strides and offset of the part of the tensor that is changed."""
        for node in self.of_kinds({"AsStrided"}):
            if kind_of_node(node.next_functions[0][0]) == "Copy":  # of the gradient
                return node._saved_size, node._saved_stride, node._saved_storage_offset
        return None

    @property
    def is_affine(self) -> bool:
        """Whether the operation assigns values to a part of a tensor, adds to it, or scales it."""
        others = [each for each in self.nodes if not hasattr(each, "variable")]
        return self.is_constant and len(others) == len(self.of_kinds({*_VIEWS, *_SCALES}))


def is_affine(node: Any) -> bool:
    """Return whether a node of the kind ``CopySlices`` assigns, adds or scales values."""
    return GradientGraph(node).is_affine
