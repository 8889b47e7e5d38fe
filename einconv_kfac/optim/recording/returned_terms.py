"""Losses and log-probabilities that a model returned, and that a loss is a sum of.

A loss is read through them, down to the outputs of the layers that they are computed from: there
it has the curvature that it has where the script computes them from the scores of the model.
"""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    FUNCTION,
    Edge,
    Stops,
    dependents,
    first_met,
    inputs_of,
    kind_of_node,
    leaf_of,
    within,
)
from einconv_kfac.curvature.objective.linear_parts import linear_parts
from einconv_kfac.curvature.objective.loss_graph import is_linear
from einconv_kfac.curvature.objective.nodes.reductions import keeps_selection
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.replay.loss_input import LossInput, Returned
from einconv_kfac.torch_versions import is_packed


def terms_of(
    root: Edge, pending: PendingCalls, parameters: Container[Tensor]
) -> list[tuple[PendingCall, LossInput]]:
    """Return the tensors that calls returned and in which a loss is linear.

    By itself a linear function of an output has no curvature. Numbers of parameters that the model
    uses past its layers are left out: those are its outputs. So are tensors of several numbers that
    depend on weights of layers in that way, are outputs of layers or linear in these, or are
    log-probabilities of all classes, whose curvature is known as it is; and those of functions of
    users or of checkpointed code, which torch lets nobody read twice, or of selections.

    Args:
        root: The edge of the loss.
        pending: The calls of the model.
        parameters: The parameters of the model.
    """

    def is_other(edge: Edge) -> bool:
        return pending.source_at(edge) is not None

    def is_term(edge: Edge) -> bool:
        own = pending.source_at(edge, inner=False)
        if own is None or not isinstance(own[1], Returned):
            return False
        return own[0].values[own[1]].numel() == 1 or _is_bent(edge, pending, is_other)

    def is_parameter(edge: Edge) -> bool:
        leaf = leaf_of(edge)
        return leaf is not None and leaf in parameters

    def is_of_layer(edge: Edge) -> bool:
        return leaf_of(edge) in of_layers

    edges = linear_parts(root, is_term, is_other)
    layers = pending.marked() if edges else set()
    of_layers = {parameter for module in layers for parameter in module.parameters()}
    found = []
    for edge in edges:
        owner = pending.source_at(edge)
        assert owner is not None
        is_number = owner[0].values[owner[1]].numel() == 1
        if _ends_at(edge, is_other, is_parameter if is_number else is_of_layer):
            found.append(owner)
    return found


def _is_bent(edge: Edge, pending: PendingCalls, is_source: Stops) -> bool:
    """Return whether a tensor is a nonlinear function of outputs of layers, other than scores.

    Args:
        edge: The tensor, which a call returned.
        pending: The calls of the model.
        is_source: Whether an edge is a tensor of a call.
    """
    edge = within(edge)
    if pending.is_compiled or pending.is_layer_at(edge) or kind_of_node(edge[0]) == "LogSoftmax":
        return False
    nodes = dependents(edge, is_source)
    if any(map(_is_closed, nodes)):
        return False

    def depends(each: Edge | None) -> bool:
        return each is not None and (each[0] in nodes or is_source(each))

    return not all(is_linear(node, depends) for node in nodes)


def _is_closed(node: Node) -> bool:
    """Return whether an operation cannot be read beside the backward pass, or evaluated again."""
    is_own = kind_of_node(node).startswith(FUNCTION)
    return is_own or is_packed(node) or keeps_selection(node)


def _ends_at(edge: Edge, wanted: Stops, others: Stops) -> bool:
    """Return whether a tensor depends on tensors that are wanted, and on no others past them."""
    starts = [each for each in inputs_of(edge[0]) if each is not None]
    met = first_met(starts, lambda each: wanted(each) or others(each))
    return bool(met) and all(map(wanted, met))
