"""Which operations behind a layer's calls move rows of examples, or mix them.

An index may lead to other rows in each batch, as the edges of a graph do, so that a layout that
one batch shows need not be that of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.objective.graph import inputs_of, kind_of_node, reached_nodes

_INDEXED = frozenset(
    {
        "Embedding", "EmbeddingBag", "Gather", "Index", "IndexAdd", "IndexCopy", "IndexPut",
        "IndexReduce", "IndexSelect", "MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Put",
        "Scatter", "ScatterAdd", "ScatterReduce", "SegmentReduce", "SparseAddmm", "Take",
    }
)  # fmt: skip
"""Operations on rows that an argument chooses, or adds up."""
_DIVIDED = frozenset({"Select", "Slice", "Split", "SplitWithSizes"})
"""Operations that choose rows if their dimension is the first."""
_PRODUCTS = frozenset({"Addmm", "Baddbmm", "Bmm", "Mm"})
"""Operations that add up rows if their first factor is a constant, as an adjacency matrix is."""
_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_UNKNOWN = ("autograd.Function ", "CppNode")
"""Beginnings of the names of functions of users."""


class RowMoves:
    """What the graph of a batch does with rows of examples; it is walked once, when it is needed.

    Args:
        outputs: The outputs of the model, with their graph.
    """

    def __init__(self, outputs: Sequence[Tensor | GradientEdge]) -> None:
        self._outputs = outputs

    def may_move(self, calls: Sequence[LayerCall]) -> bool:
        """Return whether another batch may have other rows of calls in the place of an example's.

        Args:
            calls: The calls.
        """
        return any(call.output.node in self._behind for call in calls)

    @cached_property
    def reached(self) -> set[Node]:
        """The nodes of the graph."""
        return reached_nodes(self._outputs)

    @cached_property
    def normalises_batches(self) -> bool:
        """Whether batch normalisation on batch statistics lies in the graph."""
        nodes: set[Any] = set(self.reached)
        norms = [node for node in nodes if kind_of_node(node) in _BATCH_NORMS]
        return any(getattr(node, "_saved_training", True) for node in norms)

    @cached_property
    def _behind(self) -> set[Node]:
        """The nodes that operations which move rows depend on."""
        return reached_nodes([edge for node in self.reached for edge in _moved(node)])


def _moved(node: Any) -> list[GradientEdge]:
    """Return the tensors whose rows an operation moves as its other arguments have it."""
    kind, edges = kind_of_node(node), inputs_of(node)
    moves = kind in _INDEXED or kind.startswith(_UNKNOWN)
    moves = moves or (kind in _DIVIDED and getattr(node, "_saved_dim", 0) == 0)
    moves = moves or (kind in _PRODUCTS and edges[-2] is None)
    return [GradientEdge(*edge) for edge in edges if edge is not None] if moves else []
