"""Losses that no label of a batch enters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from einconv_kfac.curvature.objective.graph import kind_of_node
from einconv_kfac.curvature.objective.loss_graph import LossGraph

LIKELIHOODS = frozenset({"NllLoss", "NllLoss2D"})
"""Operations that take labels, as in ``F.cross_entropy``."""
UNREDUCED = 0
"""How torch denotes ``reduction="none"``, by which ignored labels count in a later mean."""
MEAN = 1
"""How torch denotes ``reduction="mean"``."""
REPLACING = frozenset({"Index", "MaskedFill", "MaskedSelect", "NanToNum", "Where"})
"""Operations whose result may be finite where their input is not."""


def ignores_all_labels(graph: LossGraph) -> bool:
    """Return whether a loss has labels and none counts; the host reads that.

    Nothing else may enter the loss: all gradients that reach the model and the operations with a
    curvature are zero, or ``0 / 0``.
    """
    if not (found := _likelihoods(graph)):
        return False
    nonlinear = set(graph.nonlinear)
    reached: list[Tensor] = [node._saved_total_weight for node in found]
    reached += graph.ends.values()
    reached += (gradient for edge, gradient in graph.seen.items() if edge[0] in nonlinear)
    return not any(bool(each.nan_to_num(0.0).any()) for each in reached)


def is_mean_of_labels(graph: LossGraph) -> bool:
    """Return whether a loss is ``0 / 0`` if no label counts."""
    found = _likelihoods(graph)
    if not found or any(node._saved_reduction != MEAN for node in found):
        return False
    return not any(kind_of_node(node) in REPLACING for node in graph.nodes)


def _likelihoods(graph: LossGraph) -> list[Any]:
    """Return the operations that take labels; none if the loss reduces the result of one itself."""
    found: list[Any] = [node for node in graph.nodes if kind_of_node(node) in LIKELIHOODS]
    return [] if any(node._saved_reduction == UNREDUCED for node in found) else found
