"""Outputs of a model that are views, which in-place operations take out of the graph.

An operation on a view in place gives the tensor that it views a new node, and the view another
one. The node that the model's output had is then in no graph.
"""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, inputs_of, kind_of_node, mark_, mark_of

OVERWRITTEN = (
    "An output of the model that is a view, as that of a linear layer of inputs with positions, "
    "must not be changed in place before the loss, got one that was. Write `out = out / t` in "
    "place of `out /= t`, or begin with `out = model(x).clone()`."
)
"""Why a loss of an output that was overwritten cannot be read."""


def mark_viewed_(output: Tensor, owner: object) -> None:
    """Mark the tensor that an output of a model is a view of.

    Args:
        output: The output, which requires gradients.
        owner: Identifies who marks it.
    """
    base = output._base
    if base is not None and base.requires_grad:
        mark_(base, (owner, "viewed"), True)


def is_overwritten_at(edge: Edge, owner: object) -> bool:
    """Return whether an in-place operation on a view of a marked tensor leads to an edge.

    Args:
        edge: The edge.
        owner: Who marked the tensor.
    """
    if kind_of_node(edge[0]) != "CopySlices":
        return False
    base = inputs_of(edge[0])[0]
    return base is not None and mark_of(base, (owner, "viewed")) is not None
