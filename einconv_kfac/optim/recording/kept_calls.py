"""Which calls of a model are kept for losses that may still come."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

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


class KeptCalls(dict[int, PendingCall]):
    """Calls of a model by their number, in their order, of which those without use are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._most = 0  # number of calls below which none is dropped

    @property
    def latest(self) -> PendingCall | None:
        """The latest call."""
        return next(reversed(self.values()), None)

    @property
    def running(self) -> PendingCall | None:
        """The call that has begun and not ended."""
        latest = self.latest
        return latest if latest is not None and latest.is_running else None

    def having(self, numbers: Collection[int]) -> dict[int, PendingCall]:
        """Return the calls that have one of some numbers."""
        return {number: self[number] for number in sorted(numbers) if number in self}

    def drop_(self) -> None:
        """Drop calls that no loss depends on, if it is worth looking for them.

        To look takes time for each call, and a policy has a thousand, one for each of its actions.
        """
        if 0 < len(self) < self._most:
            return
        kept = {each.number for each in kept_calls([*self.values()])}
        for number in self.keys() - kept:
            del self[number]
        self._most = len(kept) + max(0, len(kept) - 2 * SMALL_CALLS_WITHOUT_LOSS) // 8


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
