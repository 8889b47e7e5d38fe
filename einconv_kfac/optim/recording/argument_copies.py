"""Lists and dictionaries of a script that a call of its model gets copies of.

What the call changes in a copy is changed in the script's own object when the call ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class ArgumentCopies:
    """Copies of nested arguments of a call.

    Args:
        given: The arguments.
        own: The same with other tensors, in new tuples, lists and dictionaries.
    """

    def __init__(self, given: Any, own: Any) -> None:
        pairs = list(_pairs(given, own))
        self._changeable = [pair for pair in pairs if isinstance(pair[0], (dict, list))]
        self._originals = {id(copy): (original, copy) for original, copy in pairs}

    def end_call_(self) -> None:
        """Change the script's objects as the call has changed the copies, and drop these."""
        for original, copy in self._changeable:
            before, after = _entries(original), self._restored(_entries(copy))
            if [*before] == [*after] and all(before[key] is after[key] for key in after):
                continue
            if isinstance(original, dict):
                original.clear()
                original.update(after)
            else:
                original[:] = after.values()
        self._changeable, self._originals = [], {}

    def _restored(self, entries: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return entries with the script's objects in place of copies."""
        known = self._originals
        return {key: known.get(id(own), (own, own))[0] for key, own in entries.items()}


def _pairs(given: Any, own: Any) -> Iterator[tuple[Any, Any]]:
    """Yield an argument and its copy, and those nested in it, as far as they differ."""
    if given is own:
        return
    yield given, own
    if isinstance(given, (dict, list, tuple)):
        parts, copies = _entries(given), _entries(own)
        for key, part in parts.items():
            yield from _pairs(part, copies[key])


def _entries(value: Any) -> dict[Any, Any]:
    """Return the entries of a tuple, a list or a dictionary by index or key."""
    return dict(value) if isinstance(value, dict) else dict(enumerate(value))
