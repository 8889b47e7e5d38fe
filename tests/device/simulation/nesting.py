"""Arguments and results of operators: lists, tuples and dictionaries of leaves.

What `torch.utils._pytree` does for any container costs more than the operators of small networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves in order."""
    found: list[Any] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    """Append the leaves of a value."""
    kind = type(value)
    if kind is tuple or kind is list:
        for part in value:
            _collect(part, found)
    elif kind is dict:
        for part in value.values():
            _collect(part, found)
    else:
        found.append(value)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same structure of what a function makes of the leaves."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(function, part) for part in value])
    if kind is dict:
        return {key: mapped(function, part) for key, part in value.items()}
    return function(value)
