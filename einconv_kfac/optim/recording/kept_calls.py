"""Which calls of a model are kept for losses that may still come."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from einconv_kfac.optim.recording.pending_call import PendingCall

CALLS_WITHOUT_LOSS = 8
"""Number of calls without a loss for which the calls of layers are kept, however large, besides
those that show that their graph exists."""
SMALL_CALLS_WITHOUT_LOSS = 64
"""The same, as long as they are small."""
ENTRIES_WITHOUT_LOSS = 1 << 22
"""Entries of layers' inputs that small calls have together."""
DROPPED = (
    "All outputs of the model that a loss depends on must exist when it is observed or computed by "
    "the loss module, got a loss of more than "
    f"{CALLS_WITHOUT_LOSS} calls, or of {SMALL_CALLS_WITHOUT_LOSS} small ones, whose outputs were "
    "gone before. Keep them until `step`: `outputs.append(model(x))`, and a loss of `outputs[-1]`."
)
"""Why a loss of calls that were dropped cannot be read."""


def kept_calls(pending: Sequence[PendingCall]) -> list[PendingCall]:
    """Return the calls that a loss may still depend on, also through later calls.

    Args:
        pending: All calls, in their order.
    """
    unused = [p for p in pending if p.may_have_loss and not p.is_alive]
    wanted = {p.number for p in unused if p.has_graph} | _last(unused)
    kept: list[PendingCall] = []
    for each in reversed(pending):  # later calls first
        if each.number in wanted or each.is_alive:
            wanted.update(each.earlier)
            kept.append(each)
    return kept[::-1]


def _last(unused: Sequence[PendingCall]) -> set[int]:
    """Return the numbers of the last calls without a loss, which are kept."""
    latest = unused[: -SMALL_CALLS_WITHOUT_LOSS - 1 : -1]
    entries = itertools.accumulate(pending.entries for pending in latest)
    return {
        pending.number
        for index, (pending, size) in enumerate(zip(latest, entries))
        if index < CALLS_WITHOUT_LOSS or size <= ENTRIES_WITHOUT_LOSS
    }
