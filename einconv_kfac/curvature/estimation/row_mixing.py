"""Operations of a model that give rows of a layer's call to several examples, or to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.objective.graph import kind_of_node, reached_nodes

_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_GATHERS = ("Index", "UnsafeIndex", "Gather", "Scatter", "MaskedS", "Take", "Put", "PackPadded")


def normalises_batches(outputs: Sequence[Tensor | GradientEdge]) -> bool:
    """Return whether batch normalisation on batch statistics lies in the graph of outputs."""
    nodes: set[Any] = set(reached_nodes(outputs))
    norms = [node for node in nodes if kind_of_node(node) in _BATCH_NORMS]
    return any(getattr(node, "_saved_training", True) for node in norms)


def behind_gathers(
    calls: Sequence[LayerCall], outputs: Sequence[Tensor | GradientEdge]
) -> set[int]:
    """Return the ids of calls between which and the outputs indices or masks choose rows."""
    gathers = [n for n in reached_nodes(outputs) if kind_of_node(n).startswith(_GATHERS)]
    behind = reached_nodes([GradientEdge(node, 0) for node in gathers])
    return {id(call) for call in calls if call.output.node in behind}
