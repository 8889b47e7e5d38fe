"""Copies by ``deepcopy`` and ``pickle``, from constructor arguments and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def rebuilt(kind: Callable[..., Any], given: dict[str, Any], state: dict[str, Any]) -> Any:
    """Return a copy, from the arguments of its constructor and its state."""
    made = kind(**given)
    made.load_state_dict(state)
    return made
