"""Which operations behind a layer's calls move rows of examples, or mix them.

An index may lead to other rows in each batch, as the edges of a graph do, so that a layout that
one batch shows need not be that of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

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


def may_move(outputs: Sequence[Tensor | GradientEdge], calls: Sequence[LayerCall]) -> bool:
    """Return whether another batch may have other rows of calls in the place of the same example.

    Args:
        outputs: The outputs of the model, with their graph.
        calls: The calls.
    """
    moved = [edge for node in reached_nodes(outputs) for edge in _moved(node)]
    behind = reached_nodes(moved)
    return any(call.output.node in behind for call in calls)


def normalises_batches(outputs: Sequence[Tensor | GradientEdge]) -> bool:
    """Return whether batch normalisation on batch statistics lies in the graph of outputs."""
    nodes: set[Any] = set(reached_nodes(outputs))
    norms = [node for node in nodes if kind_of_node(node) in _BATCH_NORMS]
    return any(getattr(node, "_saved_training", True) for node in norms)


def _moved(node: Any) -> list[GradientEdge]:
    """Return the tensors whose rows an operation moves as its other arguments have it."""
    kind, edges = kind_of_node(node), inputs_of(node)
    moves = kind in _INDEXED or kind.startswith(_UNKNOWN)
    moves = moves or (kind in _DIVIDED and getattr(node, "_saved_dim", 0) == 0)
    moves = moves or (kind in _PRODUCTS and edges[-2] is None)
    return [GradientEdge(*edge) for edge in edges if edge is not None] if moves else []
