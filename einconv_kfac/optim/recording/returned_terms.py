"""Numbers that a model returned and that are terms of a loss."""

from __future__ import annotations

from einconv_kfac.curvature.objective.graph import Edge, Stops, dependents
from einconv_kfac.curvature.objective.linear_parts import linear_parts
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.replay.loss_input import LossInput, Returned


def terms_of(root: Edge, pending: PendingCalls) -> list[tuple[PendingCall, LossInput]]:
    """Return the numbers of calls in which a loss is linear: losses that are its terms.

    A loss is read through them, since by itself a linear function of an output has no curvature.

    Args:
        root: The edge of the loss.
        pending: The calls of the model.
    """

    def is_number(edge: Edge) -> bool:
        own = pending.source_at(edge, inner=False)
        if own is None or not isinstance(own[1], Returned):
            return False
        return own[0].values[own[1]].numel() == 1

    def is_other(edge: Edge) -> bool:
        return pending.source_at(edge) is not None

    numbers = linear_parts(root, is_number, is_other)
    owners = [pending.source_at(edge) for edge in numbers if _reaches(edge, is_other)]
    return [owner for owner in owners if owner is not None]


def _reaches(edge: Edge, stops: Stops) -> bool:
    """Return whether a tensor depends on another one at which a walk stops."""
    return bool(dependents(edge, lambda other: other != edge and stops(other)))
