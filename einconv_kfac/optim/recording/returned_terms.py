"""Numbers that a model returned and that are terms of a loss."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge, Stops, first_met, inputs_of, leaf_of
from einconv_kfac.curvature.objective.linear_parts import linear_parts
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.replay.loss_input import LossInput, Returned


def terms_of(
    root: Edge, pending: PendingCalls, parameters: Container[Tensor]
) -> list[tuple[PendingCall, LossInput]]:
    """Return the numbers of calls in which a loss is linear: losses that are its terms.

    A loss is read through them, since by itself a linear function of an output has no curvature.
    Numbers of parameters that the model uses past its layers are left out: those are its outputs.

    Args:
        root: The edge of the loss.
        pending: The calls of the model.
        parameters: The parameters of the model.
    """

    def is_number(edge: Edge) -> bool:
        own = pending.source_at(edge, inner=False)
        if own is None or not isinstance(own[1], Returned):
            return False
        return own[0].values[own[1]].numel() == 1

    def is_other(edge: Edge) -> bool:
        return pending.source_at(edge) is not None

    def is_parameter(edge: Edge) -> bool:
        leaf = leaf_of(edge)
        return leaf is not None and leaf in parameters

    numbers = linear_parts(root, is_number, is_other)
    owners = [pending.source_at(e) for e in numbers if _ends_at(e, is_other, is_parameter)]
    return [owner for owner in owners if owner is not None]


def _ends_at(edge: Edge, wanted: Stops, others: Stops) -> bool:
    """Return whether a tensor depends on tensors that are wanted, and on no others past them."""
    starts = [each for each in inputs_of(edge[0]) if each is not None]
    met = first_met(starts, lambda each: wanted(each) or others(each))
    return bool(met) and all(map(wanted, met))
