"""Copies of what owns a model, from the arguments it was made with and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a constructor that has just begun was given, without the parameters."""
    return {n: value for n, value in names.items() if n not in ("self", "params", "__class__")}


def shared_arguments(given: Mapping[str, Any], other: Callable[..., Any]) -> dict[str, Any]:
    """Return those of a constructor's arguments that another one takes too."""
    return {name: given[name] for name in signature(other).parameters if name in given}


def rebuilt(kind: Callable[..., Any], given: dict[str, Any], state: dict[str, Any]) -> Any:
    """Return a copy, from the arguments it was made with and its state."""
    made = kind(**given)
    made.load_state_dict(state)
    return made
